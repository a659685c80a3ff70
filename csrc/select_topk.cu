// Top-k of every row, one block a row or a cluster of them.
//
// Up to 16384 tokens a row's keys stay in registers: memory is read once. Longer rows are read anew
// in each of the six or so sweeps over the keys, from L2 where they fit.
//
// A block issues, per 32 tokens, some 120 warp instructions (load, key and census 43, a round of the
// histogram 10, two counts 11 each, writing 45; counted in code for sm_90), which four schedulers
// share: 2700 cycles at 2880 tokens, 9300 at 10,000, to which add about 2000 of latency (load,
// census, two rounds of three barriers, writing). Beyond 4096 tokens a cluster shares the row, where
// there are clusters and room for those of all rows at once: an eighth of the instructions, for six
// cluster barriers. Below, barriers would cost what they save. All by count: nothing is measured.
#include "cuda_ops.h"
#include "vtp/cluster_launch.cuh"
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

constexpr int kClusterThreads = 512, kClusterKeysPerThread = 4;
constexpr int kMostClusterKeys = kClusterBlocks * kClusterThreads * kClusterKeysPerThread;

template <class T>
__global__ void __launch_bounds__(kClusterThreads, 2) select_in_cluster(SelectTopk a) {
  VTP_SHARED(ClusterScratch<kClusterThreads>, scratch);
  cluster_arrive();
  const int64_t row = blockIdx.x / kClusterBlocks;
  const ScoreRow<T> scores = {view_as<const T>(a.scores).at(row)};
  const int size = static_cast<int>(a.scores.size[1]);
  const SelectRow rest = select_row_of(a, row);
  await_earlier_kernels();
  select_cluster_row<kClusterThreads, kClusterKeysPerThread>(scores, size, rest, scratch);
  cluster_wait();
}

template <int Threads, int KeysPerThread, class T>
void launch_held(const SelectTopk& a, OpStream& stream) {
  const dim3 grid(static_cast<unsigned>(a.scores.size[0]));
  launch("select_topk", select_held<Threads, KeysPerThread, T>, grid, Threads, 0, stream, a);
}

template <class T>
bool fits_clusters(const SelectTopk& a) {
  return a.scores.size[0] <= clusters_at_once("select_topk", select_in_cluster<T>, kClusterBlocks,
                                              kClusterThreads);
}

template <class T>
void launch_in_clusters(const SelectTopk& a, OpStream& stream) {
  const dim3 grid(static_cast<unsigned>(a.scores.size[0] * kClusterBlocks));
  launch(LaunchOptions{kClusterBlocks}, "select_topk in clusters", select_in_cluster<T>, grid,
         kClusterThreads, 0, stream, a);
}

template <class T>
void launch_select(const SelectTopk& a, OpStream& stream) {
  const int64_t size = a.scores.size[1];
  if (size <= 256 * 4) return launch_held<256, 4, T>(a, stream);
  if (size <= 512 * 8) return launch_held<512, 8, T>(a, stream);
  if (size <= kMostClusterKeys && fits_clusters<T>(a)) return launch_in_clusters<T>(a, stream);
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
