// float16 as bits, with CUDA's conversions; arithmetic is left to float.
#pragma once

#include <cstdint>

#include "intrinsics.h"
#include "vector_types.h"

struct __half {
  unsigned short bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
  if (magnitude >= 0x0400u) return __uint_as_float(sign | (magnitude + (112u << 10)) << 13);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return __uint_as_float(sign | __float_as_uint(subnormal));
}

// To nearest, ties to even; NaN to 0x7fff.
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1)) >> 13;
  } else {  // adding 1/2 leaves the multiple of 2^-24 in the last bits, rounded as float sums are
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<unsigned short>(half | (bits >> 16 & 0x8000u))};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
