// A cluster: blocks that run at the same time, can wait for each other and reach into each other's
// shared memory (sm_90 on; launch.cuh tells how one is launched). In older code, which launch() does
// not start with a cluster, a block is one by itself.
//
// A block may be reached into once it has begun, which the first cluster barrier says, and until it
// ends, so the last access is to be followed by one more barrier.
#pragma once

#include "platform.cuh"

namespace vtp::cuda {

#ifdef VTP_EMULATOR

using emulator::cluster_arrive;
using emulator::cluster_blocks;
using emulator::cluster_rank;
using emulator::cluster_sync;
using emulator::cluster_wait;
using emulator::map_shared_rank;

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VTP_HAS_CLUSTERS 1
#endif

// This block's number in its cluster, and how many blocks there are.
VTP_DEVICE int cluster_rank() {
  unsigned rank = 0;
#ifdef VTP_HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

VTP_DEVICE int cluster_blocks() {
  unsigned blocks = 1;
#ifdef VTP_HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// The barrier of all threads of the cluster in two halves. What a thread did before it came is seen
// by those who have waited; what it does in between is not.
VTP_DEVICE void cluster_arrive() {
#ifdef VTP_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

VTP_DEVICE void cluster_wait() {
#ifdef VTP_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

VTP_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of block `rank`.
template <class T>
VTP_DEVICE T* map_shared_rank(T* place, int rank) {
#ifdef VTP_HAS_CLUSTERS
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(mapped)
               : "l"(reinterpret_cast<uint64_t>(place)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  (void)rank;
  return place;
#endif
}

#undef VTP_HAS_CLUSTERS

#endif

}  // namespace vtp::cuda
