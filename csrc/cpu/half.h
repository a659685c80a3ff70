// 16-bit floats as storage: exact conversion to float, round-to-nearest-even back.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

namespace vtp::cpu {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

namespace {

VTP_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

VTP_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

VTP_INLINE float widen(float x) { return x; }
VTP_INLINE double widen(double x) { return x; }
VTP_INLINE float widen(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
VTP_INLINE float widen(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  // Infinity and NaN keep an all-ones exponent; the rest is rebiased by a multiplication, which
  // also normalises subnormals.
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | magnitude | 0x7f800000u);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

VTP_INLINE void narrow(float x, float& out) { out = x; }
VTP_INLINE void narrow(double x, double& out) { out = x; }
VTP_INLINE void narrow(float x, bfloat16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
VTP_INLINE void narrow(float x, float16& out) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and up round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let an addition at the right exponent round
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// Calls f with a value of the dtype's type.
template <class F>
VTP_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(float16{});
    case DType::bf16:
      return f(bfloat16{});
  }
}

}  // namespace
}  // namespace vtp::cpu
