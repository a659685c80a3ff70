// Whether it pays to launch a kernel in clusters, asked of the runtime once per device and kernel.
#pragma once

#include "launch.cuh"

namespace vtp::cuda {

#ifdef VTP_EMULATOR

template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, unsigned /*cluster*/, unsigned /*threads*/) {
  return architecture_of(name, kernel) < kClusterArchitecture ? 0 : 16;
}

#else

struct ClusterCounts {
  std::mutex mutex;
  std::map<std::pair<int, const void*>, int> counts;  // by device and kernel
};

inline ClusterCounts& cluster_counts() {
  static ClusterCounts all;
  return all;
}

// How many clusters of `cluster` blocks of `threads` threads the current device runs at the same
// time; 0 where its code knows no clusters, or a slice of a GPU has no room for one. May be asked
// while a CUDA graph is captured.
template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, unsigned cluster, unsigned threads) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  const void* entry = reinterpret_cast<const void*>(kernel);
  ClusterCounts& all = cluster_counts();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto known = all.counts.find({device, entry});
  if (known != all.counts.end()) return known->second;
  int count = 0;
  if (architecture_of(name, kernel) >= kClusterArchitecture) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(threads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&count, entry, &config), name);
  }
  all.counts[{device, entry}] = count;
  return count;
}

#endif

}  // namespace vtp::cuda
