// Few query rows: dot products along D, softmax along the keys.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

// Dot products of K rows with R vectors, `vectors` [R, size]; out[r * out_stride + k].
template <class T, int R, int K>
VTP_INLINE void dot_tile(const T* const* rows, const Wide<T>* vectors, int64_t size, Wide<T>* out,
                         int64_t out_stride) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>;
  Vec<A> sums[K][R] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int k = 0; k < K; ++k) {
      const Vec<A> x = load(rows[k] + i);
      for (int r = 0; r < R; ++r) sums[k][r] = sums[k][r] + x * load(vectors + r * size + i);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) {
      A sum = sum_lanes(sums[k][r]);
      for (int64_t j = i; j < size; ++j) sum += widen(rows[k][j]) * vectors[r * size + j];
      out[r * out_stride + k] = sum;
    }
  }
}

// out[r][j] = <vectors[r], row position[j]>; rows of out are `out_stride` apart.
template <class T>
void dot_rows(const T* rows, int64_t stride, const int32_t* position, int64_t size,
              const Wide<T>* vectors, int64_t count, int64_t dim, Wide<T>* out,
              int64_t out_stride) {
  constexpr int kTile = 4;  // 4 x 4 sums fill 16 registers and hide the latency of the additions
  const auto tile = [&](int64_t j, auto rows_of_tile) {
    constexpr int K = decltype(rows_of_tile)::value;
    const T* row[K];
    for (int k = 0; k < K; ++k) row[k] = rows + position[j + k] * stride;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      dot_tile<T, 4, K>(row, vectors + r * dim, dim, out + r * out_stride + j, out_stride);
    }
    for (; r < count; ++r) {
      dot_tile<T, 1, K>(row, vectors + r * dim, dim, out + r * out_stride + j, out_stride);
    }
  };
  int64_t j = 0;
  for (; j + kTile <= size; j += kTile) tile(j, std::integral_constant<int, kTile>{});
  for (; j < size; ++j) tile(j, std::integral_constant<int, 1>{});
}

template <class A>
VTP_INLINE A largest(const A* x, int64_t size) {
  constexpr int kStep = kLanes<A>;
  Vec<A> top = splat<A>(-INFINITY);
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) top = larger<A>(top, load(x + i));
  A maximum = -INFINITY;
  for (int lane = 0; lane < kStep; ++lane) maximum = std::max(maximum, top[lane]);
  for (; i < size; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

// x[i] = 2^(x[i] - base); returns their sum.
template <class A>
VTP_INLINE A exponentials(A* x, int64_t size, A base) {
  constexpr int kStep = kLanes<A>;
  Vec<A> sums = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    const Vec<A> y = exp2_of(load(x + i) - base);
    store(x + i, y);
    sums = sums + y;
  }
  A sum = sum_lanes(sums);
  for (; i < size; ++i) sum += x[i] = exp2_of(x[i] - base);
  return sum;
}

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
