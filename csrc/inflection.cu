// The knee of every row's sorted curve, one block a row.
//
// Up to 8192 tokens a row is sorted in 32 KB of shared memory (any device has 48) while its keys
// also stay in registers, in the order in which the chosen ones are written. Longer rows are sorted
// in the workspace, by the same code, and read again for the writing.
#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/inflection_row.cuh"
#include "vtp/joined_ops.cuh"

namespace vtp::cuda {
namespace {

constexpr int kKeysPerThread = 8, kMostThreads = 1024;
constexpr int64_t kMostShared = kMostThreads * kKeysPerThread;

template <int Threads, class T>
__global__ void __launch_bounds__(Threads) inflection_held(Inflection a) {
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(InflectionScratch<Threads>, scratch);
  await_earlier_kernels();
  const CurveSource<T> curve = {view_as<const T>(a.curve).at(blockIdx.x)};
  HeldKeys<Threads, kKeysPerThread> keys;
  keys.load(curve, static_cast<int>(a.curve.size[1]));
  inflect_row(a, blockIdx.x, keys, reinterpret_cast<uint32_t*>(shared), scratch);
}

template <int Threads, class T>
__global__ void __launch_bounds__(Threads) inflection_streamed(Inflection a, uint32_t* workspace) {
  VTP_SHARED(InflectionScratch<Threads>, scratch);
  await_earlier_kernels();
  const int size = static_cast<int>(a.curve.size[1]);
  const CurveSource<T> curve = {view_as<const T>(a.curve).at(blockIdx.x)};
  const StreamedKeys<Threads, CurveSource<T>> keys(curve, size);
  uint32_t* sorted = workspace + static_cast<int64_t>(blockIdx.x) * padded_size(size);
  inflect_row(a, blockIdx.x, keys, sorted, scratch);
}

template <int Threads, class T>
void launch_held(const Inflection& a, OpStream& stream) {
  const dim3 grid(static_cast<unsigned>(a.curve.size[0]));
  const size_t shared = padded_size(a.curve.size[1]) * sizeof(uint32_t);
  launch("inflection", inflection_held<Threads, T>, grid, Threads, shared, stream, a);
}

template <class T>
void launch_inflection(const Inflection& a, uint32_t* workspace, OpStream& stream) {
  const int64_t size = a.curve.size[1];
  if (size <= 256 * kKeysPerThread) return launch_held<256, T>(a, stream);
  if (size <= kMostShared) return launch_held<kMostThreads, T>(a, stream);
  const dim3 grid(static_cast<unsigned>(a.curve.size[0]));
  launch("inflection", inflection_streamed<kMostThreads, T>, grid, kMostThreads, 0, stream, a,
         workspace);
}

}  // namespace

size_t inflection_workspace(const Inflection& a) {
  Pieces pieces(nullptr);
  const int64_t rows = a.curve.size[0], size = a.curve.size[1];
  if (size > kMostShared) pieces.take<uint32_t>(rows * padded_size(size));
  return pieces.bytes();
}

void inflection(const Inflection& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  inflection(a, workspace, ours);
}

void inflection(const Inflection& a, void* workspace, OpStream& stream) {
  with_type(a.curve.dtype, [&](auto type) {
    launch_inflection<decltype(type)>(a, static_cast<uint32_t*>(workspace), stream);
  });
}

}  // namespace vtp::cuda
