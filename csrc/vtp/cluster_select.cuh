// The steps of block_select.cuh for a row whose tokens a cluster of blocks shares, each block
// holding the keys of one run of them.
//
// Blocks tell each other what they counted by writing it into each other's shared memory, and every
// block then draws the same conclusion, so a step takes one cluster barrier. Of a round's histogram
// only the sums of 32 slots each are told; once these show where the cut lies, the 32 counts that
// matter are read from the other blocks.
#pragma once

#include "block_select.cuh"
#include "cluster.cuh"

namespace vtp::cuda {

constexpr int kClusterBlocks = 8;  // that share a row

// What a cluster's block has of a row.
struct Run {
  int begin, size;
};

VTP_DEVICE Run run_of_block(int row_size) {
  const int words = (row_size + kWarp - 1) / kWarp;
  const int most = (words + kClusterBlocks - 1) / kClusterBlocks * kWarp;
  const int begin = cluster_rank() * most, left = row_size - begin;
  return {begin, left < 0 ? 0 : left < most ? left : most};
}

// Counts of the whole row, and of the part of it that lies before this block's run.
struct ClusterCensus {
  Census all;
  int competing_before, kept_before;
};

// What a round finds: a slot, how many keys lie in slots before it and in it.
struct ClusterSlot {
  int slot, above, count;
  int above_before, count_before;  // of these, those in runs before this block's
};

// Which keys are taken, and how many that are lie before this block's run.
struct ClusterCut {
  uint32_t key;
  int above, equal;  // keys above the cut, keys equal to it
  int ties;          // so many of those equal to it are taken, the first of the row
};

template <int Threads>
struct ClusterScratch {
  static constexpr int kSlotBits = 11, kSlots = 1 << kSlotBits, kGroups = kSlots / kWarp;
  static constexpr int kSlotsPerThread = kSlots / Threads;
  static_assert(kSlotsPerThread == 4, "a thread's slots are an int4");

  // Rounds take turns: what others may still be reading is left alone.
  alignas(16) int slots[2][kSlots];
  int groups[2][kClusterBlocks][kGroups];  // of each block, as it told
  Census blocks[kClusterBlocks], own;
  EmitScratch emit;
  ClusterSlot found;
};

// Before the first census, and before another one after a cluster barrier.
template <int Threads>
VTP_DEVICE void cluster_prepare(ClusterScratch<Threads>& scratch) {
  reinterpret_cast<int4*>(scratch.slots[0])[threadIdx.x] = int4{0, 0, 0, 0};
  if (threadIdx.x == 0) scratch.own = census_of_none();
  __syncthreads();
}

// All blocks of the cluster must have begun, see cluster.cuh.
template <int Threads, class Keys>
VTP_DEVICE ClusterCensus take_cluster_census(const Keys& keys, ClusterScratch<Threads>& scratch) {
  count_in(keys, scratch.own);
  __syncthreads();
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  if (thread < kClusterBlocks) *map_shared_rank(&scratch.blocks[rank], thread) = scratch.own;
  cluster_sync();
  ClusterCensus census = {census_of_none(), 0, 0};
#pragma unroll
  for (int b = 0; b < kClusterBlocks; ++b) {
    const Census block = scratch.blocks[b];
    census.all.competing += block.competing;
    census.all.kept += block.kept;
    census.competing_before += b < rank ? block.competing : 0;
    census.kept_before += b < rank ? block.kept : 0;
    if (block.lowest < census.all.lowest) census.all.lowest = block.lowest;
    if (block.highest > census.all.highest) census.all.highest = block.highest;
  }
  return census;
}

// Tells all blocks how many keys of this one lie in each group of slots.
template <int Threads>
VTP_DEVICE void tell_groups(int round, ClusterScratch<Threads>& scratch) {
  constexpr int kThreadsPerGroup = kWarp / ClusterScratch<Threads>::kSlotsPerThread;
  static_assert(kThreadsPerGroup == kClusterBlocks, "each of them tells one block");
  const int thread = static_cast<int>(threadIdx.x);
  const int4 counts = reinterpret_cast<const int4*>(scratch.slots[round])[thread];
  const int sum = warp_sum<kThreadsPerGroup>(counts.x + counts.y + counts.z + counts.w);
  int* place = &scratch.groups[round][cluster_rank()][thread / kThreadsPerGroup];
  *map_shared_rank(place, thread % kThreadsPerGroup) = sum;
}

// By one warp: the slot that holds the need-th key. Pairs of counts are of all blocks and, in the
// upper half, of those before this one.
template <int Threads>
VTP_DEVICE ClusterSlot find_cluster_slot(int round, int need, ClusterScratch<Threads>& scratch) {
  static_assert(ClusterScratch<Threads>::kGroups == 2 * kWarp, "a lane has two groups");
  const int rank = cluster_rank();
  const auto add = [&](unsigned& pair, int block, int count) {
    pair += static_cast<unsigned>(count) * (block < rank ? 0x10001u : 1u);
  };
  const auto all = [](unsigned pair) { return static_cast<int>(pair & 0xffff); };

  unsigned first = 0, second = 0;
#pragma unroll
  for (int b = 0; b < kClusterBlocks; ++b) {
    add(first, b, scratch.groups[round][b][2 * lane_id()]);
    add(second, b, scratch.groups[round][b][2 * lane_id() + 1]);
  }
  const unsigned before = warp_exclusive_sum(first + second);
  const bool is_first = need <= all(before + first);
  const bool is_mine = all(before) < need && need <= all(before + first + second);
  const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_mine))) - 1;
  const int group = __shfl_sync(kAllLanes, 2 * lane_id() + (is_first ? 0 : 1), owner);
  const unsigned base = __shfl_sync(kAllLanes, before + (is_first ? 0 : first), owner);

  const int slot = group * kWarp + lane_id();
  int counts[kClusterBlocks];
#pragma unroll
  for (int b = 0; b < kClusterBlocks; ++b) {
    counts[b] = *map_shared_rank(&scratch.slots[round][slot], b);
  }
  unsigned count = 0;
#pragma unroll
  for (int b = 0; b < kClusterBlocks; ++b) add(count, b, counts[b]);
  const unsigned above = base + warp_exclusive_sum(count);
  const bool is_slot = all(above) < need && need <= all(above + count);
  const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_slot))) - 1;
  const unsigned found_above = __shfl_sync(kAllLanes, above, lane);
  const unsigned found_count = __shfl_sync(kAllLanes, count, lane);
  return {group * kWarp + lane, all(found_above), all(found_count),
          static_cast<int>(found_above >> 16), static_cast<int>(found_count >> 16)};
}

// The cut for `need` of the competing keys, 0 <= need <= census.all.competing, and all kept ones.
template <int Threads, class Keys>
VTP_DEVICE ClusterCut find_cluster_cut(const Keys& keys, const ClusterCensus& census, int need,
                                       ClusterScratch<Threads>& scratch) {
  constexpr int kSlotBits = ClusterScratch<Threads>::kSlotBits;
  int above = census.kept_before, equal = census.competing_before;
  if (need == 0) return {kKeptKey - 1, above, 0, 0};
  if (need == census.all.competing) return {kAbsentKey, above + equal, 0, 0};
  KeyRange range = {census.all.lowest, census.all.highest};
  for (int round = 0; !range.is_one_key(); round = 1 - round) {
    const int shift = range.shift(kSlotBits);
    range.count(keys, shift, scratch.slots[round]);
    __syncthreads();
    tell_groups(round, scratch);
    cluster_sync();
    reinterpret_cast<int4*>(scratch.slots[1 - round])[threadIdx.x] = int4{0, 0, 0, 0};
    if (warp_id() == 0) {
      const ClusterSlot found = find_cluster_slot(round, need, scratch);
      if (lane_id() == 0) scratch.found = found;
    }
    __syncthreads();
    const ClusterSlot found = scratch.found;
    need -= found.above;
    above += found.above_before;
    equal = found.count_before;
    range.narrow(found.slot, shift);
    if (need == found.count) return {range.lowest - 1, above + equal, 0, 0};
  }
  return {range.highest, above, equal, need};
}

// Writes this block's share of the row's tokens to where it belongs.
template <int Threads, class Keys>
VTP_DEVICE void emit_share(const Keys& keys, const ClusterCut& cut, int64_t* indices,
                           EmitScratch& scratch) {
  using Counts = CutCounts<typename Keys::Pair>;
  const Counts counts = count_at_cut<Threads>(keys, cut.key, scratch);
  write_tokens(keys, cut.key, cut.above + Counts::above(counts.before),
               cut.equal + Counts::equal(counts.before), cut.ties, indices);
}

}  // namespace vtp::cuda
