// Kernels of one op call that overlap (sm_90 on; OpStream in launch.cuh launches them): a kernel
// may begin before the ones it follows have ended, so that its launch and what it does first take
// no time of their own. Until it has waited it must neither read what they write nor write what
// they touch, and every thread must have waited before it ends: else the kernel behind it, which
// waits for this one alone, would not have waited for the others. In plain launches and in older
// code there is nothing to wait for.
#pragma once

#include "platform.cuh"

namespace vtp::cuda {

#ifdef VTP_EMULATOR

using emulator::await_earlier_kernels;
using emulator::release_next_kernel;

#else

// Waits until the kernels before this one in its op have ended and all they wrote can be read.
VTP_DEVICE void await_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin once all blocks have come here. Nothing is said of what this one has
// written, so the sooner the better.
VTP_DEVICE void release_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif

}  // namespace vtp::cuda
