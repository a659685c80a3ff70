// Vectors as wide as the instruction set this file is compiled for, and a register-tiled matrix
// product.
//
// Everything here lives in namespace vtp::cpu::VTP_ISA and is inlined, see VTP_INLINE.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "half.h"
#include "ops.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPanelVectors = 4;  // 4 x 6 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPanelVectors = 2;  // 2 x 6 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kPanelVectors = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kPanelVectors = 2;
#endif

constexpr double kLog2e = 1.4426950408889634;  // softmax is computed in base 2

typedef float Float32s __attribute__((vector_size(kVectorBytes)));
typedef double Float64s __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64s __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32s __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// What an element type is computed in.
template <class T>
struct Compute {
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Scalar = double;
};
template <class T>
using Wide = typename Compute<T>::Scalar;

template <class A>
struct Simd;
template <>
struct Simd<float> {
  using V = Float32s;
  using I = Int32s;
};
template <>
struct Simd<double> {
  using V = Float64s;
  using I = Int64s;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using Ints = typename Simd<A>::I;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);
template <class A>
constexpr int kPanelLanes = kPanelVectors * kLanes<A>;

template <class A>
VTP_INLINE Vec<A> splat(A x) {
  return Vec<A>{} + x;
}

template <class V, class T>
VTP_INLINE V bits_at(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
VTP_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

VTP_INLINE Float32s load(const float* p) { return bits_at<Float32s>(p); }
VTP_INLINE Float64s load(const double* p) { return bits_at<Float64s>(p); }
VTP_INLINE Float32s load(const bfloat16* p) {
  return (Float32s)(__builtin_convertvector(bits_at<Halves>(p), UInt32s) << 16);
}
VTP_INLINE Float32s load(const float16* p) {
#if defined(__AVX512F__)
  return (Float32s)_mm512_cvtph_ps(bits_at<__m256i>(p));
#elif defined(__F16C__)
  return (Float32s)_mm256_cvtph_ps(bits_at<__m128i>(p));
#else  // as widen(float16)
  const UInt32s half = __builtin_convertvector(bits_at<Halves>(p), UInt32s);
  const UInt32s sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const UInt32s finite = (UInt32s)((Float32s)magnitude * 0x1p112f);
  return (Float32s)(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
#endif
}

// Sum of all lanes, always in the same order.
VTP_INLINE float sum_lanes(Float32s v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
VTP_INLINE double sum_lanes(Float64s v) {
  double sum = 0.0;
  for (int i = 0; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}

// 2^x to 2 ulp for float (Cephes' polynomial); results below 2^-125 are 0.
VTP_INLINE Float32s exp2_of(Float32s x) {
  const Float32s shifted = x + 12582912.0f;  // 1.5 * 2^23: the rounded x ends up in the low bits
  const Float32s f = x - (shifted - 12582912.0f);
  Float32s p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  Float32s y = (Float32s)((UInt32s)p + ((UInt32s)shifted << 23));
  y = x < -125.0f ? splat(0.0f) : y;
  y = x >= 128.0f ? splat(INFINITY) : y;
  return x == x ? y : x;
}
VTP_INLINE Float64s exp2_of(Float64s x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}
template <class A>
VTP_INLINE A exp2_of(A x) {
  return exp2_of(splat(x))[0];
}

VTP_INLINE Float32s sqrt_of(Float32s x) {
#if defined(__AVX512F__)
  return (Float32s)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Float32s)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
VTP_INLINE Float64s sqrt_of(Float64s x) {
#if defined(__AVX512F__)
  return (Float64s)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Float64s)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

template <class A>
VTP_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  return b > a ? b : a;
}

// Uninitialised scratch memory, aligned for vectors.
template <class T>
class Scratch {
 public:
  VTP_INLINE explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {}
  VTP_INLINE ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  VTP_INLINE operator T*() const { return data_; }

 private:
  T* data_;
};

// out[i] = row[i], widened.
template <class T>
VTP_INLINE void widen_row(const T* row, int64_t size, Wide<T>* out) {
  int64_t i = 0;
  for (; i + kLanes<Wide<T>> <= size; i += kLanes<Wide<T>>) store(out + i, load(row + i));
  for (; i < size; ++i) out[i] = widen(row[i]);
}

// c[j][lane] = sum_k b[j * bj + k * bk] * x[k][lane] for J values of j; with `add`, on top of c.
// x and c have V vectors a row.
template <class A, int V, int J>
VTP_INLINE void product_tile(const A* x, const A* b, int64_t bj, int64_t bk, int64_t size, A* c,
                             bool add) {
  constexpr int kStep = kLanes<A>;
  Vec<A> sum[J][V] = {};
  if (add) {
    for (int j = 0; j < J; ++j) {
      for (int v = 0; v < V; ++v) sum[j][v] = load(c + (j * V + v) * kStep);
    }
  }
  for (int64_t k = 0; k < size; ++k) {
    Vec<A> lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load(x + (k * V + v) * kStep);
    for (int j = 0; j < J; ++j) {
      const Vec<A> factor = splat(b[j * bj + k * bk]);
      for (int v = 0; v < V; ++v) sum[j][v] = sum[j][v] + factor * lanes[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) store(c + (j * V + v) * kStep, sum[j][v]);
  }
}

// The same for any number of rows j.
template <class A, int V>
VTP_INLINE void product(const A* x, const A* b, int64_t bj, int64_t bk, int64_t size, int64_t rows,
                        A* c, bool add) {
  constexpr int kTile = 6 * (kPanelVectors / V);
  int64_t j = 0;
  for (; j + kTile <= rows; j += kTile) {
    product_tile<A, V, kTile>(x, b + j * bj, bj, bk, size, c + j * V * kLanes<A>, add);
  }
  for (; j + 2 <= rows; j += 2) {
    product_tile<A, V, 2>(x, b + j * bj, bj, bk, size, c + j * V * kLanes<A>, add);
  }
  if (j < rows) product_tile<A, V, 1>(x, b + j * bj, bj, bk, size, c + j * V * kLanes<A>, add);
}

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
