// Cosines of rows rounded to 7 bits or a little less: coarse, but from integer products, of which a CPU makes three to
// four times as many as of floats. They tell where to look, never what is so.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

// The largest entry. Where products are not added up in 32 bits at once, kPairSums sums of two of them
// stay within 16 bits: the rounding is coarser, and a third less is to do.
template <bool InOne>
constexpr int kMostCoarse = InOne ? 63 : 44;
template <bool InOne>  // makes entries positive, as one factor of the products must be
constexpr int kCoarseBias = kMostCoarse<InOne> + 1;
constexpr int kPairSums = 4;
static_assert(kPairSums * 2 * kMostCoarse<false> * (kMostCoarse<false> + kCoarseBias<false>) < 1 << 15);
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
  int32_t bias;   // kCoarseBias times the sum of the row
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

// out[i] = round(row[i] * factor), for whole vectors of floats; |row[i] * factor| <= 127.
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
VTP_INLINE CoarseVector plus_bytes(CoarseVector x, int y) {
  return _mm512_add_epi8(x, _mm512_set1_epi8(static_cast<char>(y)));
}

// sum += products, of four neighbours each. Not an intrinsic: this file is compiled for CPUs without
// it, too.
VTP_INLINE void add_bytes(CoarseVector& sum, CoarseVector x, CoarseVector y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}
VTP_INLINE void add_pairs(CoarseVector& pairs, CoarseVector x, CoarseVector y) {
  pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(x, y));
}
VTP_INLINE CoarseVector plus_pairs(CoarseVector sum, CoarseVector pairs) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
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
VTP_INLINE CoarseVector plus_bytes(CoarseVector x, int y) {
  return _mm256_add_epi8(x, _mm256_set1_epi8(static_cast<char>(y)));
}

VTP_INLINE void add_bytes(CoarseVector&, CoarseVector, CoarseVector) {}  // never called
VTP_INLINE void add_pairs(CoarseVector& pairs, CoarseVector x, CoarseVector y) {
  pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x, y));
}
VTP_INLINE CoarseVector plus_pairs(CoarseVector sum, CoarseVector pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
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

// sums[j][i] += <x[i], y[j]> of the bytes in [begin, end): at most kPairSums vectors, unless InOne.
template <bool InOne, int J, int I>
VTP_INLINE void add_products(const int8_t* const (&x)[I], const int8_t* const (&y)[J], int64_t begin,
                             int64_t end, CoarseVector (&sums)[J][I]) {
  CoarseVector pairs[J][I] = {};
  for (int64_t c = begin; c < end; c += sizeof(CoarseVector)) {
    CoarseVector lanes[I];
    for (int i = 0; i < I; ++i) lanes[i] = coarse_load(x[i] + c);
    for (int j = 0; j < J; ++j) {
      const CoarseVector row = coarse_load(y[j] + c);
      for (int i = 0; i < I; ++i) {
        if constexpr (InOne) {
          add_bytes(sums[j][i], lanes[i], row);
        } else {
          add_pairs(pairs[j][i], lanes[i], row);
        }
      }
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int i = 0; !InOne && i < I; ++i) sums[j][i] = plus_pairs(sums[j][i], pairs[j][i]);
  }
}

template <bool InOne, int J, int I>
VTP_INLINE void multiply_bytes(const int8_t* const (&x)[I], const int8_t* const (&y)[J],
                               int64_t stride, CoarseVector (&sums)[J][I]) {
  constexpr int64_t kBlock = kPairSums * sizeof(CoarseVector);
  for (int64_t c = 0; c < stride; c += InOne ? stride : kBlock) {
    add_products<InOne>(x, y, c, InOne ? stride : std::min(c + kBlock, stride), sums);
  }
}

template <bool InOne>
VTP_INLINE CoarseVector biased(CoarseVector x) {
  return plus_bytes(x, kCoarseBias<InOne>);
}

template <bool InOne>
VTP_INLINE CoarseNorm coarse_norm(const int8_t* row, int64_t stride) {
  CoarseVector sum = {}, product = {};
  const auto add = [](CoarseVector& to, CoarseVector x, CoarseVector y) {
    CoarseVector pairs = {};
    if constexpr (InOne) return add_bytes(to, x, y);
    add_pairs(pairs, x, y);
    to = plus_pairs(to, pairs);
  };
  for (int64_t c = 0; c < stride; c += sizeof(CoarseVector)) {
    const CoarseVector x = coarse_load(row + c);
    add(sum, biased<InOne>(CoarseVector{}), x);
    add(product, biased<InOne>(x), x);
  }
  const int32_t bias = sum_of(sum), square = sum_of(product) - bias;
  return {bias, square > 0 ? 1 / std::sqrt(static_cast<float>(square)) : 0.0f};
}

VTP_INLINE int most_coarse() { return has_byte_products() ? kMostCoarse<true> : kMostCoarse<false>; }
VTP_INLINE CoarseNorm coarse_norm(const int8_t* row, int64_t stride) {
  return has_byte_products() ? coarse_norm<true>(row, stride) : coarse_norm<false>(row, stride);
}

// products[j][i] = <x[i], y[j]>, of four rows each, those of x biased and `stride` apart.
template <bool InOne>
VTP_INLINE void coarse_tile(const int8_t* x, const int8_t* const* y, int64_t stride,
                            __m128i (&products)[4]) {
  for (int first = 0; first < 4; first += kCoarseRows) {
    CoarseVector sum[kCoarseRows][4] = {};
    const int8_t* rows[kCoarseRows];
    for (int j = 0; j < kCoarseRows; ++j) rows[j] = y[first + j];
    multiply_bytes<InOne>({x, x + stride, x + 2 * stride, x + 3 * stride}, rows, stride, sum);
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
        const CoarseVector of_x = biased<InOne>(coarse_load(rows[i + row] + c));
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
VTP_INLINE int most_coarse() { return 0; }
VTP_INLINE CoarseNorm coarse_norm(const int8_t*, int64_t) { return {}; }
VTP_INLINE void coarse_cosines(const int8_t* const*, const CoarseNorm*, int64_t, int64_t, int64_t,
                               int64_t, float*, int64_t) {}
#endif

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
