// Runs CUDA kernels, unchanged, on a CPU: their logic, synchronisation and memory accesses, neither
// their speed nor the GPU's memory model. Header only; csrc/vtp/platform.cuh is the way in.
#pragma once

#include <cstdint>

#include "multiprocessor.h"

namespace vtp::emulator {

// Runs body() in every thread of the grid, `cluster` neighbouring blocks in x at a time. Throws
// std::runtime_error where a kernel goes wrong. A dependent launch may on a GPU run beside all those
// before it, back to the last plain one.
template <class Body>
void launch(const char* name, dim3 grid, dim3 block, unsigned cluster, bool dependent,
            size_t dynamic_shared, const Body& body) {
  multiprocessor.launch(name, grid, block, cluster, dependent, dynamic_shared, body);
}

inline void set_order(Order order, uint64_t seed = 1) { multiprocessor.set_order(order, seed); }

// The running block's shared object.
template <class Type>
Type& shared(int id) {
  static_assert(std::is_trivially_default_constructible_v<Type>, "shared memory is not initialised");
  return *static_cast<Type*>(
      multiprocessor.shared_object(id, typeid(Type), sizeof(Type), alignof(Type)));
}

inline unsigned char* dynamic_shared() { return multiprocessor.dynamic_shared(); }

// See csrc/vtp/cluster.cuh.
inline int cluster_rank() { return static_cast<int>(multiprocessor.cluster_rank()); }
inline int cluster_blocks() { return static_cast<int>(multiprocessor.cluster_blocks()); }
inline void cluster_arrive(Site site = Site::here()) { multiprocessor.cluster_arrive(site); }
inline void cluster_wait(Site site = Site::here()) { multiprocessor.cluster_wait(site); }
inline void cluster_sync(Site site = Site::here()) {
  multiprocessor.cluster_arrive(site);
  multiprocessor.cluster_wait(site);
}
template <class T>
T* map_shared_rank(T* place, int rank) {
  return reinterpret_cast<T*>(multiprocessor.map_shared_rank(place, static_cast<unsigned>(rank)));
}

// See csrc/vtp/dependent_launch.cuh.
inline void await_earlier_kernels(Site site = Site::here()) {
  multiprocessor.await_earlier_kernels(site);
}
inline void release_next_kernel() {}

// The values all 32 lanes of the warp brought, by lane; good until the lane's next collective.
template <class T>
const T* all_lanes(const T& value, Site site = Site::here()) {
  return multiprocessor.exchange("all_lanes", ~0u, value, site);
}

// In scope of one a lane takes part in a matrix load from shared memory. Traffic builds count what
// the lane asks for, the 16 bytes of its row, and not how the emulation goes about it.
class MatrixLoad {
 public:
#ifdef VTP_EMULATOR_TRAFFIC
  __attribute__((always_inline)) explicit MatrixLoad(const void* row) {
    untracked_.note(Access::read, row, 16, accesses::this_place());
  }

 private:
  Untracked untracked_;
#else
  explicit MatrixLoad(const void*) {}
#endif
};

__attribute__((always_inline)) inline void copy_async(void* shared, const void* source, size_t bytes) {
  if (bytes != AsyncCopies::kBytes || reinterpret_cast<uintptr_t>(shared) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    multiprocessor.fail("copy_async moves 16 bytes, aligned to 16");
  }
  multiprocessor.copy_async(shared, source, accesses::this_place());
}

// See csrc/vtp/wgmma.cuh.
inline uint32_t shared_address(const void* place) { return multiprocessor.shared_address(place); }
inline void fence_operands(Site site = Site::here()) { multiprocessor.fence_operands(site); }
inline void begin_products(Site site = Site::here()) { multiprocessor.begin_products(site); }
inline void commit_products(Site site = Site::here()) { multiprocessor.commit_products(site); }
template <unsigned Count>
__attribute__((always_inline)) inline void wgmma(float (&sums)[Count], unsigned columns, uint64_t a,
                                                 uint64_t b, bool accumulate, WidenElement widen,
                                                 Site site = Site::here()) {
  multiprocessor.wgmma(sums, Count, columns, a, b, accumulate, widen, site, accesses::this_place());
}
__attribute__((always_inline)) inline void wait_products(Site site = Site::here()) {
  multiprocessor.wait_products(site, accesses::this_place());
}

inline void commit_copies() { multiprocessor.commit_copies(); }

__attribute__((always_inline)) inline void wait_copies(int pending) {
  multiprocessor.wait_copies(pending, accesses::this_place());
}

}  // namespace vtp::emulator
