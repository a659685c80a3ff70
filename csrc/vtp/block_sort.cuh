// Keys in descending order, by one block, in shared or in global memory: a bitonic sort that leaves
// the registers as rarely as it can. Eight keys a thread make a segment of 256 keys a warp, within
// which strides are registers or shuffles; wider strides go through memory, up to three in a pass.
// 1024 keys take 6 passes with a barrier each, 8192 take 14. Keys alone are moved: what equal keys
// belong to does not matter to those who call.
//
// A lane takes its eight keys in two accesses of 16 bytes. Eight lanes, which shared memory serves at
// once, would meet in half of the banks: they lie 32 bytes apart. So until the last pass the halves of
// every other four lanes' keys change places.
#pragma once

#include "warp.cuh"

namespace vtp::cuda {

constexpr int kSegmentLog = 8, kSegment = 1 << kSegmentLog;  // keys of one warp, 8 a lane

VTP_DEVICE void put_larger_first(uint32_t& a, uint32_t& b) {
  const uint32_t larger = a < b ? b : a;
  b = a < b ? a : b;
  a = larger;
}

// All keys of a thread upside down or not: then descending is the only direction there is.
template <int Count>
VTP_DEVICE void flip_if(bool flip, uint32_t (&keys)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) keys[i] ^= flip ? 0xffffffffu : 0;
}

// Sorts a thread's bitonic sequence.
template <int Count>
VTP_DEVICE void merge_own(uint32_t (&keys)[Count]) {
#pragma unroll
  for (int stride = Count / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if ((i & stride) == 0) put_larger_first(keys[i], keys[i + stride]);
    }
  }
}

// Sorts a thread's eight keys.
VTP_DEVICE void sort_own(uint32_t (&keys)[8]) {
#pragma unroll
  for (int size = 2; size < 8; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((i & stride) != 0) continue;
        if ((i & size) == 0) {
          put_larger_first(keys[i], keys[i + stride]);
        } else {
          put_larger_first(keys[i + stride], keys[i]);
        }
      }
    }
  }
  merge_own(keys);
}

// Sorts bitonic sequences of 2^Log keys, 2^(Log - 3) neighbouring lanes each.
template <int Log>
VTP_DEVICE void merge_lanes(uint32_t (&keys)[8]) {
#pragma unroll
  for (int stride = 1 << (Log - 4); stride > 0; stride /= 2) {
    const bool takes_larger = (lane_id() & stride) == 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, keys[i], stride);
      keys[i] = (keys[i] < other) == takes_larger ? other : keys[i];
    }
  }
  merge_own(keys);
}

// Where a key is until the last pass. (What is to be sorted may lie in any order.)
VTP_DEVICE unsigned banked(unsigned index) { return index ^ (index >> 3 & 4); }

// Calls f(keys, index of the first) for this thread's part of every segment of its warp.
template <int Threads, class F>
VTP_DEVICE void for_each_segment(uint32_t* keys, unsigned size, bool is_last, const F& f) {
  const auto halves = [&](unsigned place) { return reinterpret_cast<uint4*>(keys + place); };
  for (unsigned segment = warp_id(); segment < size / kSegment; segment += Threads / kWarp) {
    const unsigned first = segment * kSegment + lane_id() * 8;
    const unsigned from = banked(first), to = is_last ? first : from;
    const uint4 low = *halves(from), high = *halves(from ^ 4);
    uint32_t own[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    f(own, first);
    *halves(to) = make_uint4(own[0], own[1], own[2], own[3]);
    *halves(to ^ 4) = make_uint4(own[4], own[5], own[6], own[7]);
  }
}

// Whether the sequence of 2^log keys that holds this one is to ascend for now: every other is, so
// that each with its neighbour is bitonic.
VTP_DEVICE bool ascends(unsigned index, int log) { return (index >> log & 1) != 0; }

template <int Log>
VTP_DEVICE void merge_sequences(uint32_t (&keys)[8], unsigned first) {
  flip_if(ascends(first, Log), keys);
  merge_lanes<Log>(keys);
  flip_if(ascends(first, Log), keys);
}

VTP_DEVICE void sort_segment(uint32_t (&keys)[8], unsigned first) {
  flip_if(ascends(first, 3), keys);
  sort_own(keys);
  flip_if(ascends(first, 3), keys);
  merge_sequences<4>(keys, first);
  merge_sequences<5>(keys, first);
  merge_sequences<6>(keys, first);
  merge_sequences<7>(keys, first);
  merge_sequences<8>(keys, first);
}

// Merges sequences of 2^sequence_log keys by the strides 2^(log + Strides - 1) ... 2^log.
template <int Threads, int Strides>
VTP_DEVICE void merge_wide(uint32_t* keys, unsigned size, int log, int sequence_log) {
  constexpr int kCount = 1 << Strides;
  for (unsigned i = threadIdx.x; i < size >> Strides; i += Threads) {
    const unsigned first = (i >> log << (log + Strides)) | (i & ((1u << log) - 1));
    uint32_t* place = keys + banked(first);  // the same for every j: log is kSegmentLog or more
    uint32_t own[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) own[j] = place[static_cast<unsigned>(j) << log];
    flip_if(ascends(first, sequence_log), own);
    merge_own(own);
    flip_if(ascends(first, sequence_log), own);
#pragma unroll
    for (int j = 0; j < kCount; ++j) place[static_cast<unsigned>(j) << log] = own[j];
  }
  __syncthreads();
}

// `size` is a power of two, 256 at least; `keys` is aligned to 16 bytes. All keys are in place
// before a barrier that precedes the call; a barrier ends it.
template <int Threads>
VTP_DEVICE void sort_descending(uint32_t* keys, unsigned size) {
  for_each_segment<Threads>(keys, size, size == kSegment,
                            [](auto& own, unsigned first) { sort_segment(own, first); });
  __syncthreads();
  for (int sequence_log = kSegmentLog + 1; size >> sequence_log != 0; ++sequence_log) {
    int log = sequence_log;  // strides from here on are done
    for (; log >= kSegmentLog + 3; log -= 3) {
      merge_wide<Threads, 3>(keys, size, log - 3, sequence_log);
    }
    if (log == kSegmentLog + 2) merge_wide<Threads, 2>(keys, size, log - 2, sequence_log);
    if (log == kSegmentLog + 1) merge_wide<Threads, 1>(keys, size, log - 1, sequence_log);
    const bool is_last = size >> sequence_log == 1;
    for_each_segment<Threads>(keys, size, is_last, [&](auto& own, unsigned first) {
      flip_if(ascends(first, sequence_log), own);
      merge_lanes<kSegmentLog>(own);
      flip_if(ascends(first, sequence_log), own);
    });
    __syncthreads();
  }
}

}  // namespace vtp::cuda
