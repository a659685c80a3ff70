// Whether it pays to launch a kernel in clusters, asked of the runtime once per device and kernel.
#pragma once

#include "launch.cuh"

namespace vtp::cuda {

#ifdef VTP_EMULATOR

template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, unsigned /*cluster*/, unsigned /*threads*/,
                     size_t /*dynamic_shared*/ = 0) {
  return architecture_of(name, kernel) < kClusterArchitecture ? 0 : 16;
}

#else

// How many clusters of `cluster` blocks of `threads` threads, each with so much dynamic shared
// memory, the current device runs at the same time; of a kernel it is always to be asked alike. 0
// where its code knows no clusters, or a slice of a GPU has no room for one. May be asked
// while a CUDA graph is captured.
template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, unsigned cluster, unsigned threads,
                     size_t dynamic_shared = 0) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (dynamic_shared > 0) ask_for_dynamic_shared(name, entry, dynamic_shared);
  return with_kernel_state(name, entry, [&](KernelState& state) {
    int& count = state.clusters_at_once;
    if (count >= 0) return count;
    if (state.architecture < kClusterArchitecture) return count = 0;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = dynamic_shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int found = 0;
    check(cudaOccupancyMaxActiveClusters(&found, entry, &config), name);
    return count = found;
  });
}

#endif

}  // namespace vtp::cuda
