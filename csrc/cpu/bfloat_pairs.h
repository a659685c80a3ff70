// Products of bfloat16, two channels at a time, on CPUs that have an instruction for them: twice as
// many as of floats. Products are exact and sums are float, but what is subnormal counts as 0, so
// the rows must not be small (see kLeastSquare).
#pragma once

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

using Pair = uint32_t;  // channels 2k and 2k + 1, the first in the low half

// Of rows that are at least this long what is lost is less than 2^-20 of a sum's rounding.
constexpr float kLeastSquare = 0x1p-60f;

// The last pair of an odd number of channels is filled up with 0.
VTP_INLINE void copy_pairs(const bfloat16* row, int64_t channels, Pair* out) {
  if (channels % 2) out[channels / 2] = 0;
  std::memcpy(out, row, sizeof(bfloat16) * channels);
}

#if defined(__AVX512F__)
VTP_INLINE bool has_pair_products() { return __builtin_cpu_supports("avx512bf16"); }

template <int V, int J>
__attribute__((target("avx512bf16"))) void pair_tile(const Pair* x, const Pair* b, int64_t bj,
                                                     int64_t pairs, float* c, bool add) {
  Float32s sum[J][V] = {};
  if (add) {
    for (int j = 0; j < J; ++j) {
      for (int v = 0; v < V; ++v) std::memcpy(&sum[j][v], c + (j * V + v) * 16, sizeof(Float32s));
    }
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = _mm512_loadu_si512(x + (k * V + v) * 16);
    for (int j = 0; j < J; ++j) {
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(b[j * bj + k]));
      for (int v = 0; v < V; ++v) {
        sum[j][v] = (Float32s)_mm512_dpbf16_ps((__m512)sum[j][v], (__m512bh)factor,
                                               (__m512bh)lanes[v]);
      }
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) std::memcpy(c + (j * V + v) * 16, &sum[j][v], sizeof(Float32s));
  }
}

// As product<float, V>, of pairs; `rows` is a multiple of 6.
template <int V>
VTP_INLINE void pair_product(const Pair* x, const Pair* b, int64_t bj, int64_t pairs, int64_t rows,
                             float* c, bool add) {
  constexpr int kTile = 6 * (4 / V);
  for (int64_t j = 0; j < rows; j += kTile) {
    pair_tile<V, kTile>(x, b + j * bj, bj, pairs, c + j * V * 16, add);
  }
}
#else
VTP_INLINE bool has_pair_products() { return false; }

template <int V>
VTP_INLINE void pair_product(const Pair*, const Pair*, int64_t, int64_t, int64_t, float*, bool) {}
#endif

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
