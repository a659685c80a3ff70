// The parts of a greedy choice that all rules share: who is best, and who was chosen.
#pragma once

#include <climits>

#include "cluster.cuh"
#include "sortable.cuh"
#include "warp.cuh"

namespace vtp::cuda {

// A column of the greatest key, the first of equals. Key 0: there is none.
struct alignas(8) Pick {
  uint32_t key;
  int column;

  VTP_DEVICE static Pick none() { return {0, INT_MAX}; }
  VTP_DEVICE bool exists() const { return key != 0; }

  VTP_DEVICE void consider(uint32_t other, int at) {
    if (other > key || (other == key && at < column)) *this = {other, at};
  }
};

VTP_DEVICE Pick warp_best(const Pick& mine) {
  const uint32_t key = warp_max(mine.key);
  return {key, warp_min(mine.key == key ? mine.column : INT_MAX)};
}

VTP_DEVICE int warps_of_block() { return static_cast<int>(blockDim.x) / kWarp; }

// By a whole block, with one barrier. Two calls in a row must not share their scratch: what the
// slowest thread still reads is then left alone.
VTP_DEVICE Pick block_best(const Pick& mine, Pick (&scratch)[kWarp]) {
  const Pick of_warp = warp_best(mine);
  if (lane_id() == 0) scratch[warp_id()] = of_warp;
  __syncthreads();
  Pick best = Pick::none();
  if (lane_id() < warps_of_block()) best = scratch[lane_id()];
  return warp_best(best);
}

// The same by a whole cluster, which may be a single block, with one barrier of the cluster. All its
// blocks must have begun.
template <int Blocks>
VTP_DEVICE Pick cluster_best(const Pick& mine, Pick (&scratch)[Blocks * kWarp]) {
  const int warps = warps_of_block(), blocks = cluster_blocks();
  const Pick of_warp = warp_best(mine);
  if (lane_id() < blocks) {
    *map_shared_rank(&scratch[cluster_rank() * warps + warp_id()], lane_id()) = of_warp;
  }
  cluster_sync();
  Pick best = Pick::none();
  for (int i = lane_id(); i < blocks * warps; i += kWarp) {
    best.consider(scratch[i].key, scratch[i].column);
  }
  return warp_best(best);
}

// By a whole block: over how many of the `size` columns is(column) is true.
template <class Is>
VTP_DEVICE int count_columns(const Is& is, int size, BlockScratch<int>& scratch) {
  int mine = 0;
  for (int column = threadIdx.x; column < size; column += blockDim.x) mine += is(column);
  mine = warp_sum(mine);
  if (lane_id() == 0) scratch.per_warp[warp_id()] = mine;
  __syncthreads();
  int count = 0;
  if (lane_id() < warps_of_block()) count = scratch.per_warp[lane_id()];
  return warp_sum(count);
}

// By a whole block: writes the columns from `begin` to `end`, of which `begin` is a multiple of 32,
// where is(column) is true, ascending, from place `before` on and as far as `capacity`; returns the
// place behind the last one.
template <class Is>
VTP_DEVICE int write_columns(const Is& is, int begin, int end, int before, int64_t capacity,
                             int64_t* indices, BlockScratch<int>& scratch) {
  const int words = (end - begin + kWarp - 1) / kWarp;
  const int words_of_warp = (words + warps_of_block() - 1) / warps_of_block();
  const int first = begin + warp_id() * words_of_warp * kWarp + lane_id();
  int mine = 0;
  for (int word = 0; word < words_of_warp; ++word) {
    const int column = first + word * kWarp;
    mine += __popc(__ballot_sync(kAllLanes, column < end && is(column)));
  }
  if (lane_id() == 0) scratch.per_warp[warp_id()] = mine;
  __syncthreads();
  int of_warp = 0;
  if (lane_id() < warps_of_block()) of_warp = scratch.per_warp[lane_id()];
  const int all = warp_sum(of_warp);
  int place = before + warp_sum(lane_id() < warp_id() ? of_warp : 0);
  for (int word = 0; word < words_of_warp; ++word) {
    const int column = first + word * kWarp;
    const bool chosen = column < end && is(column);
    const unsigned lanes = __ballot_sync(kAllLanes, chosen);
    const int at = place + __popc(lanes & ((1u << lane_id()) - 1));
    if (chosen && at < capacity) indices[at] = column;
    place += __popc(lanes);
  }
  return before + all;
}

// By a whole block: says how many columns were chosen and fills up with -1.
VTP_DEVICE void write_rest(int count, int64_t capacity, int64_t* indices, int32_t* counts) {
  const int64_t written = count < capacity ? count : capacity;
  if (threadIdx.x == 0) *counts = static_cast<int32_t>(written);
  for (int64_t i = written + threadIdx.x; i < capacity; i += blockDim.x) indices[i] = -1;
}

}  // namespace vtp::cuda
