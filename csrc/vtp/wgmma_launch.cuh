// Whether kernels that multiply by warpgroups (wgmma.cuh) can be launched.
#pragma once

#include "launch.cuh"

namespace vtp::cuda {

#ifdef VTP_EMULATOR

inline bool device_has_wgmma(const char* /*name*/) {
  const auto& device = emulator::multiprocessor;
  return device.architecture() == device.kProductArchitecture;
}

#else

// Whether the current device is one of compute capability 9.0: code for 9.0a runs there and nowhere
// else. May be asked while a CUDA graph is captured.
inline bool device_has_wgmma(const char* name) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), name);
  return major == 9 && minor == 0;
}

#endif

// On the current device, in code that was compiled for it. VTP_WGMMA is read once: 0 turns it off.
inline bool wgmma_is_on(const char* name) {
  static const bool is_on = switch_is_on("VTP_WGMMA");
  return is_on && device_has_wgmma(name);
}

}  // namespace vtp::cuda
