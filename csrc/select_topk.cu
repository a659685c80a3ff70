// Top-k of every row, one block a row.
//
// Up to 16384 tokens a row's keys stay in registers: memory is read once. Longer rows are read anew
// in each of the six or so sweeps over the keys, from L2 where they fit. Several blocks for a row
// would only pay beyond some 10,000 tokens, and cost a second launch below.
//
// One block does, per 32 tokens, some 60 warp instructions (load and key 15, census 6, a round of
// the histogram 5, writing 20), which four schedulers share: at 2880 tokens that is 1400 cycles, to
// which add about 2000 of latency (load, census, two rounds of three barriers, writing): some 2 us
// by that count, which no measurement backs.
#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/joined_ops.cuh"
#include "vtp/select_row.cuh"

namespace vtp::cuda {
namespace {

// The number of blocks side by side is a licence to use registers: without it, 512 threads get 40 of
// them and spill.
template <int Threads, int KeysPerThread, class T>
__global__ void __launch_bounds__(Threads, 1024 / Threads) select_held(SelectTopk a) {
  VTP_SHARED(SelectScratch<Threads>, scratch);
  const ScoreRow<T> scores = {view_as<const T>(a.scores).at(blockIdx.x)};
  const int size = static_cast<int>(a.scores.size[1]);
  const SelectRow row = select_row_of(a, blockIdx.x);
  await_earlier_kernels();
  select_held_row<Threads, KeysPerThread>(scores, size, row, scratch);
}

template <int Threads, class T>
__global__ void __launch_bounds__(Threads) select_streamed(SelectTopk a) {
  VTP_SHARED(SelectScratch<Threads>, scratch);
  const ScoreRow<T> scores = {view_as<const T>(a.scores).at(blockIdx.x)};
  const int size = static_cast<int>(a.scores.size[1]);
  const SelectRow row = select_row_of(a, blockIdx.x);
  await_earlier_kernels();
  select_streamed_row(scores, size, row, scratch);
}

template <int Threads, int KeysPerThread, class T>
void launch_held(const SelectTopk& a, OpStream& stream) {
  const dim3 grid(static_cast<unsigned>(a.scores.size[0]));
  launch("select_topk", select_held<Threads, KeysPerThread, T>, grid, Threads, 0, stream, a);
}

template <class T>
void launch_select(const SelectTopk& a, OpStream& stream) {
  const int64_t size = a.scores.size[1];
  if (size <= 256 * 4) return launch_held<256, 4, T>(a, stream);
  if (size <= 512 * 8) return launch_held<512, 8, T>(a, stream);
  if (size <= 1024 * 16) return launch_held<1024, 16, T>(a, stream);
  const dim3 grid(static_cast<unsigned>(a.scores.size[0]));
  launch("select_topk", select_streamed<1024, T>, grid, 1024, 0, stream, a);
}

}  // namespace

size_t select_topk_workspace(const SelectTopk&) { return 0; }

void select_topk(const SelectTopk& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  select_topk(a, workspace, ours);
}

void select_topk(const SelectTopk& a, void*, OpStream& stream) {
  with_type(a.scores.dtype, [&](auto type) { launch_select<decltype(type)>(a, stream); });
}

}  // namespace vtp::cuda
