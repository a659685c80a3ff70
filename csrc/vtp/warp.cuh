// Reductions and scans over a warp and over a block, in a fixed order: same bits on every run.
#pragma once

#include <type_traits>

#include "platform.cuh"

namespace vtp::cuda {

VTP_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
VTP_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

struct Sum {
  template <class T>
  VTP_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  VTP_DEVICE T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

struct Min {
  template <class T>
  VTP_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// Integers of 32 bits that one instruction of sm_80 reduces over a warp.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <class T>
constexpr bool kReducesAtOnce = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;

template <class T>
VTP_DEVICE T reduce_at_once(T x, Sum) {
  return __reduce_add_sync(kAllLanes, x);
}
template <class T>
VTP_DEVICE T reduce_at_once(T x, Max) {
  return __reduce_max_sync(kAllLanes, x);
}
template <class T>
VTP_DEVICE T reduce_at_once(T x, Min) {
  return __reduce_min_sync(kAllLanes, x);
}
#else
template <class T>
constexpr bool kReducesAtOnce = false;
#endif

// Over groups of Width neighbouring lanes; every lane gets its group's result.
template <int Width = kWarp, class T, class Operation>
VTP_DEVICE T warp_reduce(T x, Operation operation) {
  if constexpr (Width == kWarp && kReducesAtOnce<T>) {
    return reduce_at_once(x, operation);
  } else {
#pragma unroll
    for (int offset = Width / 2; offset > 0; offset /= 2) {
      x = operation(x, __shfl_xor_sync(kAllLanes, x, offset));
    }
    return x;
  }
}

template <int Width = kWarp, class T>
VTP_DEVICE T warp_sum(T x) {
  return warp_reduce<Width>(x, Sum{});
}

template <int Width = kWarp, class T>
VTP_DEVICE T warp_max(T x) {
  return warp_reduce<Width>(x, Max{});
}

template <int Width = kWarp, class T>
VTP_DEVICE T warp_min(T x) {
  return warp_reduce<Width>(x, Min{});
}

// Sum of x over the lanes before this one.
template <class T>
VTP_DEVICE T warp_exclusive_sum(T x) {
  T sum = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane_id() >= offset) sum += before;
  }
  return sum - x;
}

// One per reduction that runs in a block; two in a row may share it, since each leaves it behind a
// barrier.
template <class T>
struct BlockScratch {
  T per_warp[kWarp];
};

// Over all threads of a block of Threads, one-dimensional; every thread gets the result.
template <int Threads, class T, class Operation>
VTP_DEVICE T block_reduce(T x, Operation operation, BlockScratch<T>& scratch) {
  constexpr int kWarps = Threads / kWarp;
  static_assert(Threads % kWarp == 0 && kWarps <= kWarp);
  x = warp_reduce(x, operation);
  if (kWarps == 1) return x;
  if (lane_id() == 0) scratch.per_warp[warp_id()] = x;
  __syncthreads();
  T result = scratch.per_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = operation(result, scratch.per_warp[warp]);
  __syncthreads();
  return result;
}

// Sum of x over the threads before this one; *total is the sum over all.
template <int Threads>
VTP_DEVICE int block_exclusive_sum(int x, int* total, BlockScratch<int>& scratch) {
  constexpr int kWarps = Threads / kWarp;
  static_assert(Threads % kWarp == 0 && kWarps <= kWarp);
  const int before = warp_exclusive_sum(x);
  if (lane_id() == kWarp - 1) scratch.per_warp[warp_id()] = before + x;
  __syncthreads();
  int base = 0, all = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const int sum = scratch.per_warp[warp];
    base += warp < warp_id() ? sum : 0;
    all += sum;
  }
  __syncthreads();
  *total = all;
  return base + before;
}

}  // namespace vtp::cuda
