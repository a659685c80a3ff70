// Cosines of rows rounded to 7 bits: coarse, but from integer products, of which a CPU makes three to
// four times as many as of floats. They tell where to look, never what is so.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr float kMostCoarse = 63;   // so that no sum of two products leaves 16 bits
constexpr int kCoarseBias = 64;     // makes them positive, as one factor of the products must be
constexpr int64_t kCoarseStep = 64;  // bytes: rows are filled up with zeros to whole steps

#if defined(__AVX2__)
constexpr bool kHasCoarse = true;
#else
constexpr bool kHasCoarse = false;
#endif

// Of a row of so many channels: an odd number of steps, so that rows do not share cache sets.
VTP_INLINE int64_t coarse_stride(int64_t channels) {
  return ((channels + kCoarseStep - 1) / kCoarseStep | 1) * kCoarseStep;
}

// What turns products into cosines: cosine = (biased product - bias of y) * inverse of x * of y.
struct CoarseNorm {
  int32_t bias;   // kCoarseBias * the sum of the row
  float inverse;  // of its length; 0 of a row of zeros
};

typedef uint8_t LowBytes __attribute__((vector_size(kVectorBytes / 4)));

// The lowest byte of each lane. Compilers take the lanes apart for it.
VTP_INLINE LowBytes low_bytes(UInt32s x) {
#if defined(__AVX512F__)
  return (LowBytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
  const __m256i first = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
  const __m256i four = _mm256_shuffle_epi8((__m256i)x, first);  // of each half, in front
  const __m128i all =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  LowBytes bytes;
  std::memcpy(&bytes, &all, sizeof bytes);
  return bytes;
#else
  return __builtin_convertvector(x, LowBytes);
#endif
}

// out[i] = round(row[i] * factor), for whole vectors of floats; |row[i] * factor| <= kMostCoarse.
// Returns <row, row>, summed as pair_products does.
template <class T>
VTP_INLINE float round_row(const T* row, int64_t size, float factor, int8_t* out) {
  Float32s squares = {};
  for (int64_t i = 0; i < size; i += kLanes<float>) {
    const Float32s x = load(row + i), shifted = x * factor + 12582912.0f;  // as in exp2_of
    squares = squares + x * x;
    const LowBytes bytes = low_bytes((UInt32s)shifted);
    std::memcpy(out + i, &bytes, sizeof bytes);
  }
  return sum_lanes(squares);
}

#if defined(__AVX2__)
#if defined(__AVX512F__)
using CoarseVector = __m512i;
constexpr int kCoarseRows = 4;  // of y: 4 x 4 sums of 32 registers

VTP_INLINE bool has_byte_products() { return __builtin_cpu_supports("avx512vnni"); }
VTP_INLINE CoarseVector coarse_load(const int8_t* p) { return _mm512_loadu_si512(p); }
VTP_INLINE CoarseVector biased(CoarseVector x) {
  return _mm512_add_epi8(x, _mm512_set1_epi8(kCoarseBias));
}

template <bool InOne>
VTP_INLINE void add_bytes(CoarseVector& sum, CoarseVector x, CoarseVector y) {
  if constexpr (InOne) {  // not an intrinsic: this file is compiled for CPUs without it, too
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  } else {
    const __m512i pairs = _mm512_maddubs_epi16(x, y);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
}
VTP_INLINE __m256i halved(CoarseVector v) {
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#else
using CoarseVector = __m256i;
constexpr int kCoarseRows = 2;

VTP_INLINE bool has_byte_products() { return false; }
VTP_INLINE CoarseVector coarse_load(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
VTP_INLINE CoarseVector biased(CoarseVector x) {
  return _mm256_add_epi8(x, _mm256_set1_epi8(kCoarseBias));
}

template <bool>
VTP_INLINE void add_bytes(CoarseVector& sum, CoarseVector x, CoarseVector y) {
  const __m256i pairs = _mm256_maddubs_epi16(x, y);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
VTP_INLINE __m256i halved(CoarseVector v) { return v; }
#endif

VTP_INLINE int32_t sum_of(CoarseVector v) {
  int32_t lanes[8], sum = 0;
  const __m256i half = halved(v);
  std::memcpy(lanes, &half, sizeof half);
  for (int lane = 0; lane < 8; ++lane) sum += lanes[lane];
  return sum;
}

template <bool InOne>
VTP_INLINE CoarseNorm coarse_norm(const int8_t* row, int64_t stride) {
  CoarseVector sum = {}, product = {};
  for (int64_t c = 0; c < stride; c += sizeof(CoarseVector)) {
    const CoarseVector x = coarse_load(row + c);
    add_bytes<InOne>(sum, biased(CoarseVector{}), x);
    add_bytes<InOne>(product, biased(x), x);
  }
  const int32_t bias = sum_of(sum), square = sum_of(product) - bias;
  return {bias, square > 0 ? 1 / std::sqrt(static_cast<float>(square)) : 0.0f};
}

VTP_INLINE CoarseNorm coarse_norm(const int8_t* row, int64_t stride) {
  return has_byte_products() ? coarse_norm<true>(row, stride) : coarse_norm<false>(row, stride);
}

// products[j][i] = <x[i], y[j]>, of four rows each, those of x biased and `stride` apart.
template <bool InOne>
VTP_INLINE void coarse_tile(const int8_t* x, const int8_t* const* y, int64_t stride,
                            __m128i (&products)[4]) {
  for (int first = 0; first < 4; first += kCoarseRows) {
    CoarseVector sum[kCoarseRows][4] = {};
    for (int64_t c = 0; c < stride; c += sizeof(CoarseVector)) {
      CoarseVector lanes[4];
      for (int i = 0; i < 4; ++i) lanes[i] = coarse_load(x + i * stride + c);
      for (int j = 0; j < kCoarseRows; ++j) {
        const CoarseVector row = coarse_load(y[first + j] + c);
        for (int i = 0; i < 4; ++i) add_bytes<InOne>(sum[j][i], lanes[i], row);
      }
    }
    for (int j = 0; j < kCoarseRows; ++j) {
      const __m256i s = _mm256_hadd_epi32(
          _mm256_hadd_epi32(halved(sum[j][0]), halved(sum[j][1])),
          _mm256_hadd_epi32(halved(sum[j][2]), halved(sum[j][3])));
      products[first + j] =
          _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    }
  }
}

// cosines[y][x] of rows [x, x + count) and [y, y + count), x <= y, and the other way round; `count` is
// a multiple of 4, rows of cosines are `width` apart.
template <bool InOne>
void coarse_cosines(const int8_t* const* rows, const CoarseNorm* norms, int64_t stride, int64_t x,
                    int64_t y, int64_t count, float* cosines, int64_t width) {
  const Scratch<int8_t> four(4 * stride);
  for (int64_t i = x; i < x + count; i += 4) {
    for (int64_t row = 0; row < 4; ++row) {
      for (int64_t c = 0; c < stride; c += sizeof(CoarseVector)) {
        const CoarseVector of_x = biased(coarse_load(rows[i + row] + c));
        std::memcpy(four + row * stride + c, &of_x, sizeof of_x);
      }
    }
    const __m128 inverse = _mm_setr_ps(norms[i].inverse, norms[i + 1].inverse, norms[i + 2].inverse,
                                       norms[i + 3].inverse);
    for (int64_t j = x == y ? i : y; j < y + count; j += 4) {
      __m128i products[4];
      coarse_tile<InOne>(four, rows + j, stride, products);
      __m128 of_y[4];
      for (int row = 0; row < 4; ++row) {
        const CoarseNorm& norm = norms[j + row];
        const __m128i product = _mm_sub_epi32(products[row], _mm_set1_epi32(norm.bias));
        of_y[row] = _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(product), inverse),
                               _mm_set1_ps(norm.inverse));
        _mm_storeu_ps(cosines + (j + row) * width + i, of_y[row]);
      }
      _MM_TRANSPOSE4_PS(of_y[0], of_y[1], of_y[2], of_y[3]);
      for (int row = 0; row < 4; ++row) {
        _mm_storeu_ps(cosines + (i + row) * width + j, of_y[row]);
      }
    }
  }
}

VTP_INLINE void coarse_cosines(const int8_t* const* rows, const CoarseNorm* norms, int64_t stride,
                               int64_t x, int64_t y, int64_t count, float* cosines, int64_t width) {
  if (has_byte_products()) {
    coarse_cosines<true>(rows, norms, stride, x, y, count, cosines, width);
  } else {
    coarse_cosines<false>(rows, norms, stride, x, y, count, cosines, width);
  }
}
#else
VTP_INLINE CoarseNorm coarse_norm(const int8_t*, int64_t) { return {}; }
VTP_INLINE void coarse_cosines(const int8_t* const*, const CoarseNorm*, int64_t, int64_t, int64_t,
                               int64_t, float*, int64_t) {}
#endif

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
