// Scores as unsigned integers that sort like the scores: NaN lowest, -0.0 equal to +0.0.
#pragma once

#include <cstdint>
#include <cstring>

namespace vtp::cpu {

inline uint32_t sortable(float x) {
  if (x != x) return 0;
  x += 0.0f;  // -0.0 becomes +0.0
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline uint64_t sortable(double x) {
  if (x != x) return 0;
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

}  // namespace vtp::cpu
