// Functions of one thread: bits, rounding, comparisons. Those that are approximate on a GPU are exact
// to rounding here.
#pragma once

#include <math.h>

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"

namespace vtp::emulator {

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace vtp::emulator

// ---- Bits ----------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return vtp::emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return vtp::emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return vtp::emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return vtp::emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return vtp::emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return vtp::emulator::bits_as<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}

// Byte i of the result is the one that nibble i of the selector names, of the eight bytes of y, x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}

inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(uint64_t{x} * y >> 32);
}

// ---- Memory --------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T x) {
  *at = x;
}
template <class T>
void __stcg(T* at, T x) {
  *at = x;
}

// A store, in one piece.
template <class T>
void __stwb(T* at, T x) {
  *at = x;
}

[[noreturn]] inline void __trap() { vtp::emulator::multiprocessor.fail("__trap"); }

// ---- Arithmetic that is never contracted (the build forbids contraction altogether) ---------------

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

// ---- Conversions ---------------------------------------------------------------------------------

inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __int2double_rn(int x) { return x; }

// To the integer, out-of-range values to the nearest end and NaN to 0, as cvt.sat does.
inline int __float2int_rz(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return INT32_MAX;
  return x <= -2147483648.0f ? INT32_MIN : static_cast<int>(x);
}
inline int __float2int_rn(float x) { return __float2int_rz(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
inline int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }
inline long long __double2ll_rz(double x) {
  if (x != x) return INT64_MIN;
  if (x >= 9223372036854775808.0) return INT64_MAX;
  return x <= -9223372036854775808.0 ? INT64_MIN : static_cast<long long>(x);
}
inline long long __double2ll_rn(double x) { return __double2ll_rz(std::nearbyint(x)); }
inline long long __double2ll_rd(double x) { return __double2ll_rz(std::floor(x)); }
inline long long __double2ll_ru(double x) { return __double2ll_rz(std::ceil(x)); }

// ---- Functions -----------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define VTP_EMULATOR_MIN_MAX(Type)                                  \
  constexpr Type min(Type x, Type y) { return y < x ? y : x; }      \
  constexpr Type max(Type x, Type y) { return x < y ? y : x; }
VTP_EMULATOR_MIN_MAX(int)
VTP_EMULATOR_MIN_MAX(unsigned)
VTP_EMULATOR_MIN_MAX(long)
VTP_EMULATOR_MIN_MAX(unsigned long)
VTP_EMULATOR_MIN_MAX(long long)
VTP_EMULATOR_MIN_MAX(unsigned long long)
#undef VTP_EMULATOR_MIN_MAX
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
