// Barriers and warp collectives. Each knows where it was called, since threads may only meet in the
// same call.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../emulator.h"

struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

namespace vtp::emulator {

// The types CUDA has shuffles for.
template <class T>
constexpr bool can_shuffle =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long> ||
    std::is_same_v<T, unsigned long> || std::is_same_v<T, long long> ||
    std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
    std::is_same_v<T, double> || std::is_same_v<T, __half> || std::is_same_v<T, __half2> ||
    std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __nv_bfloat162>;

template <class T, class Source>
T shuffle(const char* kind, unsigned mask, const T& value, int width, Site site, Source source) {
  static_assert(can_shuffle<T>, "CUDA has no shuffle of this type");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    multiprocessor.fail(std::string(kind) + ": the width must be a power of two up to 32");
  }
  const int lane = multiprocessor.lane();
  return multiprocessor.exchange(kind, mask, value, site)[source(lane, lane & ~(width - 1))];
}

// All lanes' values in one, for the two types that sm_80 has instructions for.
template <class T, class Operation>
T reduce(const char* kind, unsigned mask, T value, Site site, Operation operation) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>,
                "CUDA reduces int and unsigned alone");
  const T* values = multiprocessor.exchange(kind, mask, value, site);
  T result = values[0];
  for (unsigned lane = 1; lane < kLanes; ++lane) result = operation(result, values[lane]);
  return result;
}

}  // namespace vtp::emulator

inline void __syncthreads(vtp::emulator::Site site = vtp::emulator::Site::here()) {
  vtp::emulator::multiprocessor.barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.barrier("__syncthreads_count", x != 0, site).yes;
}
inline int __syncthreads_or(int x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.barrier("__syncthreads_or", x != 0, site).any;
}
inline int __syncthreads_and(int x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.barrier("__syncthreads_and", x != 0, site).all;
}

inline void __syncwarp(unsigned mask = ~0u,
                       vtp::emulator::Site site = vtp::emulator::Site::here()) {
  vtp::emulator::multiprocessor.warp_barrier("__syncwarp", mask, site);
}

inline unsigned __ballot_sync(unsigned mask, int x,
                              vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.ballot("__ballot_sync", mask, x != 0, site);
}
inline int __any_sync(unsigned mask, int x,
                      vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.ballot("__any_sync", mask, x != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int x,
                      vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::multiprocessor.ballot("__all_sync", mask, x != 0, site) == ~0u;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T x,
                          vtp::emulator::Site site = vtp::emulator::Site::here()) {
  static_assert(vtp::emulator::can_shuffle<T>, "CUDA has no match of this type");
  const T* values = vtp::emulator::multiprocessor.exchange("__match_any_sync", mask, x, site);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    same |= unsigned{std::memcmp(&values[lane], &x, sizeof x) == 0} << lane;
  }
  return same;
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32,
              vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::shuffle("__shfl_sync", mask, x, width, site, [&](int, int first) {
    return first + (source & (width - 1));
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32,
                 vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::shuffle("__shfl_up_sync", mask, x, width, site, [&](int lane, int first) {
    return lane - static_cast<int>(delta) >= first ? lane - static_cast<int>(delta) : lane;
  });
}

template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32,
                   vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::shuffle("__shfl_down_sync", mask, x, width, site, [&](int lane, int first) {
    return lane + static_cast<int>(delta) < first + width ? lane + static_cast<int>(delta) : lane;
  });
}

// A lane of a later group keeps its own value; one of an earlier group may be read.
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32,
                  vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::shuffle("__shfl_xor_sync", mask, x, width, site, [&](int lane, int first) {
    const int source = (lane ^ bits) & 31;
    return source < first + width ? source : lane;
  });
}

// Sums wrap around, as on a GPU.
template <class T>
T __reduce_add_sync(unsigned mask, T x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::reduce("__reduce_add_sync", mask, x, site, [](T x, T y) {
    return static_cast<T>(static_cast<unsigned>(x) + static_cast<unsigned>(y));
  });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::reduce("__reduce_min_sync", mask, x, site,
                               [](T x, T y) { return y < x ? y : x; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x, vtp::emulator::Site site = vtp::emulator::Site::here()) {
  return vtp::emulator::reduce("__reduce_max_sync", mask, x, site,
                               [](T x, T y) { return x < y ? y : x; });
}

// One processor runs all threads in turn: memory is always up to date.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
