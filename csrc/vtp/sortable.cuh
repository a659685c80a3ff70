// Scores as unsigned integers that sort like the scores: NaN lowest, -0.0 equal to +0.0. Two values
// stay free for other uses, 0 below and all ones above every score.
#pragma once

#include "platform.cuh"

namespace vtp::cuda {

constexpr uint32_t kNanKey = 1;
constexpr uint32_t kInfinityKey = 0xff800000u, kMinusInfinityKey = 0x007fffffu;

VTP_DEVICE uint32_t sortable(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  const uint32_t key = bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
  return x == x ? key : kNanKey;
}

// The score a key was made of.
VTP_DEVICE float score_of(uint32_t key) {
  if (key == kNanKey) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

}  // namespace vtp::cuda
