// Scores as unsigned integers that sort like the scores: NaN lowest, -0.0 equal to +0.0. Two values
// stay free for other uses, 0 below and all ones above every score.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

namespace vtp::cpu {
namespace {

VTP_INLINE uint32_t sortable(float x) {
  uint32_t bits;
  const float positive_zero = x + 0.0f;  // -0.0 becomes +0.0
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const uint32_t key =
      bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return x == x ? key : 1;
}

VTP_INLINE uint64_t sortable(double x) {
  uint64_t bits;
  const double positive_zero = x + 0.0;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const uint64_t key =
      bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | uint64_t{1} << 63);
  return x == x ? key : 1;
}

}  // namespace
}  // namespace vtp::cpu
