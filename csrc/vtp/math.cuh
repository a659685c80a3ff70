// Exponentials for softmax, which is taken in base 2: logits carry a factor of log2(e).
#pragma once

#include <cmath>

#include "platform.cuh"

namespace vtp::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// 2^x to 2^-22, relative, in one instruction of the special function unit; 2^-inf is 0. Results
// below 2^-126 are flushed to 0.
VTP_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__) && !defined(VTP_EMULATOR)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

}  // namespace vtp::cuda
