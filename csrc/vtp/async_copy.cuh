// Copies from global to shared memory that do not pass through registers (sm_80 on). Older devices
// copy at once; the emulator holds a copy back until it is waited for, so a forgotten wait shows.
#pragma once

#include "platform.cuh"

namespace vtp::cuda {

// 16 bytes, both addresses aligned to 16; zeros where not `valid` (`source` is then not read).
VTP_DEVICE void copy_async(void* shared, const void* source, bool valid) {
#if defined(VTP_EMULATOR)
  emulator::copy_async(shared, valid ? source : nullptr, 16);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  int4 bits = {};
  if (valid) bits = *static_cast<const int4*>(source);
  *static_cast<int4*>(shared) = bits;
#endif
}

// Closes a group: this thread's copies since the last group.
VTP_DEVICE void commit_copies() {
#if defined(VTP_EMULATOR)
  emulator::commit_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than `Pending` of this thread's groups, the latest, are still under way. Other
// threads see the data after a barrier.
template <int Pending>
VTP_DEVICE void wait_copies() {
#if defined(VTP_EMULATOR)
  emulator::wait_copies(Pending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace vtp::cuda
