// The knee of every row's sorted curve, one block a row.
//
// Rows of up to 8192 tokens are sorted in 32 KB of shared memory (any device has 48) while their keys
// also stay in registers, in the order in which the chosen ones are written. Keys of longer rows are
// read again for the writing. They are sorted in shared memory, too, where the device has enough:
// 16384 of them want 73 KB (compute capability 8.6 has 99), 32768 want 137 (8.0 has 163, 9.0 227).
// Other rows are sorted in the workspace, by the same code.
#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/inflection_row.cuh"
#include "vtp/joined_ops.cuh"

namespace vtp::cuda {
namespace {

constexpr int kKeysPerThread = 8, kMostThreads = 1024;
constexpr int64_t kMostHeld = kMostThreads * kKeysPerThread;

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

// `workspace`: null where the row is sorted in shared memory.
template <int Threads, bool InShared, class T>
__global__ void __launch_bounds__(Threads) inflection_streamed(Inflection a, uint32_t* workspace) {
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(InflectionScratch<Threads>, scratch);
  await_earlier_kernels();
  const int size = static_cast<int>(a.curve.size[1]);
  const CurveSource<T> curve = {view_as<const T>(a.curve).at(blockIdx.x)};
  const StreamedKeys<Threads, CurveSource<T>> keys(curve, size);
  if constexpr (InShared) {
    inflect_row(a, blockIdx.x, keys, reinterpret_cast<uint32_t*>(shared), scratch);
  } else {
    uint32_t* sorted = workspace + static_cast<int64_t>(blockIdx.x) * padded_size(size);
    inflect_row(a, blockIdx.x, keys, sorted, scratch);
  }
}

size_t sorted_bytes(const Inflection& a) {
  return padded_size(a.curve.size[1]) * sizeof(uint32_t);
}

// Whether a block of the current device may have the shared memory that a row is sorted in. (What a
// device has, the runtime knows by heart: there is nothing to keep.)
bool fits_shared(const Inflection& a) {
  if (a.curve.size[1] <= kMostHeld) return true;
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "inflection");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "inflection");
  return sorted_bytes(a) + sizeof(InflectionScratch<kMostThreads>) <= static_cast<size_t>(bytes);
}

template <class T>
void launch_inflection(const Inflection& a, uint32_t* workspace, OpStream& stream) {
  const int64_t size = a.curve.size[1];
  const dim3 grid(static_cast<unsigned>(a.curve.size[0]));
  if (size <= 256 * kKeysPerThread) {
    launch("inflection", inflection_held<256, T>, grid, 256, sorted_bytes(a), stream, a);
  } else if (size <= kMostHeld) {
    launch("inflection", inflection_held<kMostThreads, T>, grid, kMostThreads, sorted_bytes(a),
           stream, a);
  } else if (fits_shared(a)) {
    launch("inflection: long", inflection_streamed<kMostThreads, true, T>, grid, kMostThreads,
           sorted_bytes(a), stream, a, nullptr);
  } else {
    launch("inflection: longest", inflection_streamed<kMostThreads, false, T>, grid, kMostThreads,
           0, stream, a, workspace);
  }
}

}  // namespace

size_t inflection_workspace(const Inflection& a) {
  Pieces pieces(nullptr);
  if (!fits_shared(a)) pieces.take<uint32_t>(a.curve.size[0] * padded_size(a.curve.size[1]));
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
