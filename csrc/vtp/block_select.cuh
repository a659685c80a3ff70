// The best tokens of a row, found and written by one block without a sort.
//
// A row is a set of keys (sortable.cuh), larger is better. Three steps, each a few instructions per
// key, all block-wide:
//   take_census  counts the keys and finds the range they span,
//   find_cut     narrows that range to the key of the last token taken: a histogram of 2048 equal
//                slots tells which slot it lies in, that slot is the next range. Scores are mostly
//                told apart by two rounds; a range of 32 bits takes three.
//   emit         writes the indices of the tokens above the cut, ascending.
// Where ties straddle the cut those of smallest index are taken. Shared-memory atomics only count
// and take extremes of integers, so the result does not depend on their order.
//
// Keys say more than scores: kAbsentKey takes no part, kKeptKey is taken whatever the cut.
#pragma once

#include <type_traits>

#include "sortable.cuh"
#include "warp.cuh"

namespace vtp::cuda {

constexpr uint32_t kAbsentKey = 0, kKeptKey = 0xffffffffu;

// --- who holds which keys ---------------------------------------------------------------------
//
// A word is 32 consecutive tokens, one a lane. Each warp has a run of words of its own, the same
// number `words` for all, so the order of (warp, word, lane) is that of the tokens and a warp can
// write its share once it knows how many the warps before it write.
//
// Both classes below offer for_each(f), which calls f(token, key) for the thread's keys in
// ascending order. All lanes of a warp make the same calls together, so f may vote; what lies past
// the end of the row has kAbsentKey.
//
// Where keys come from is a Source, which is asked for the tokens token + 32 i, i < Count:
//   template <int Count> struct Batch;                // what was read for them
//   Batch<Count> fetch<Count>(int token, int inside)  // reads those with 32 i < inside, no others
//   uint32_t key(const Batch<Count>&, int i)          // called for the others too: any value
// fetch should not branch between its loads, nor on what they return, so that they overlap. A token
// is always fetched by the same thread.

// Four loads per thread keep enough under way where there are 1024 threads.
template <int Threads>
constexpr int kFetchBatch = Threads >= 1024 ? 4 : 8;

// Keys in registers, fetched once: rows of up to Threads * KeysPerThread tokens.
template <int Threads, int KeysPerThread>
class HeldKeys {
 public:
  static constexpr int kCapacity = Threads * KeysPerThread;
  static_assert(kCapacity < 1 << 16);
  using Pair = uint32_t;  // two counts of tokens, 16 bits each

  template <class Source>
  VTP_DEVICE void load(const Source& source, int size) {
    constexpr int kMost = kFetchBatch<Threads>;
    constexpr int kBatch = KeysPerThread < kMost ? KeysPerThread : kMost;
    static_assert(KeysPerThread % kBatch == 0);
    words_ = (size + Threads - 1) / Threads;
    first_ = warp_id() * words_ * kWarp + lane_id();
    const int inside = size - first_ < words_ * kWarp ? size - first_ : words_ * kWarp;
#pragma unroll
    for (int word = 0; word < KeysPerThread; word += kBatch) {
      const int rest = inside - word * kWarp;
      const auto batch = source.template fetch<kBatch>(first_ + word * kWarp, rest);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t key = source.key(batch, i);
        keys_[word + i] = i * kWarp < rest ? key : kAbsentKey;
      }
    }
  }

  template <class F>
  VTP_DEVICE void for_each(const F& f) const {
#pragma unroll
    for (int word = 0; word < KeysPerThread; ++word) {
      if (word < words_) f(first_ + word * kWarp, keys_[word]);
    }
  }

 private:
  int words_ = 0, first_ = 0;
  uint32_t keys_[KeysPerThread];
};

// Keys fetched anew whenever they are needed: rows of any length.
template <int Threads, class Source>
class StreamedKeys {
 public:
  using Pair = unsigned long long;  // two counts of tokens, 32 bits each

  VTP_DEVICE StreamedKeys(const Source& source, int size)
      : source_(source), size_(size), words_((size - 1) / Threads + 1) {}  // size > 0

  template <class F>
  VTP_DEVICE void for_each(const F& f) const {
    constexpr int kBatch = kFetchBatch<Threads>;
    unsigned token = warp_id() * words_ * kWarp + lane_id();  // may pass 2^31 - 1, beyond the row
    for (int word = 0; word < words_; word += kBatch, token += kBatch * kWarp) {
      const int in_row = static_cast<int>(static_cast<unsigned>(size_) - token);
      const int of_warp = (words_ - word) * kWarp, inside = in_row < of_warp ? in_row : of_warp;
      const auto batch = source_.template fetch<kBatch>(static_cast<int>(token), inside);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t key = source_.key(batch, i);
        if (word + i < words_) {
          f(static_cast<int>(token + i * kWarp), i * kWarp < inside ? key : kAbsentKey);
        }
      }
    }
  }

 private:
  Source source_;
  int size_, words_;
};

// --- the three steps --------------------------------------------------------------------------

// Shared memory of emit.
struct EmitScratch {
  unsigned long long per_warp[kWarp];
};

// Shared memory of all three; select_prepare makes it ready for a row.
template <int Threads>
struct SelectScratch {
  static constexpr int kSlotBits = Threads >= 512 ? 11 : Threads == 256 ? 10 : 9;
  static constexpr int kSlots = 1 << kSlotBits;
  static constexpr int kSlotsPerThread = kSlots / Threads;
  static_assert(Threads % kWarp == 0 && Threads >= 128 && kSlots % Threads == 0);

  alignas(16) int slots[kSlots];  // zero between rounds
  int per_warp[kWarp];
  EmitScratch emit;
  uint32_t lowest, highest;
  int competing, kept;
  int slot, above, count;
};

template <int Threads>
VTP_DEVICE void select_prepare(SelectScratch<Threads>& scratch) {
#pragma unroll
  for (int i = 0; i < scratch.kSlotsPerThread; ++i) scratch.slots[i * Threads + threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    scratch.lowest = kKeptKey;
    scratch.highest = kAbsentKey;
    scratch.competing = scratch.kept = 0;
  }
  __syncthreads();
}

struct Census {
  int competing, kept;
  uint32_t lowest, highest;  // of the keys that compete
};

// To be called once after select_prepare.
template <int Threads, class Keys>
VTP_DEVICE Census take_census(const Keys& keys, SelectScratch<Threads>& scratch) {
  using Pair = typename Keys::Pair;
  constexpr int kHalf = sizeof(Pair) * 4;
  Pair counts = 0;  // those that compete, and above them those that are kept
  uint32_t before_lowest = kKeptKey, highest = kAbsentKey;
  keys.for_each([&](int, uint32_t key) {
    const uint32_t before = key - 1;  // absent and kept keys are the largest
    const bool competes = before < kKeptKey - 1;
    counts += competes ? 1 : key == kKeptKey ? Pair{1} << kHalf : 0;
    before_lowest = before < before_lowest ? before : before_lowest;
    highest = competes && key > highest ? key : highest;
  });
  counts = warp_sum(counts);
  highest = warp_max(highest);
  before_lowest = ~warp_max(~before_lowest);
  if (lane_id() == 0) {  // 32 warps at most: cheaper than a second tree
    atomicAdd(&scratch.competing, static_cast<int>(counts & ((Pair{1} << kHalf) - 1)));
    atomicAdd(&scratch.kept, static_cast<int>(counts >> kHalf));
    atomicMax(&scratch.highest, highest);
    atomicMin(&scratch.lowest, before_lowest + 1);
  }
  __syncthreads();
  return {scratch.competing, scratch.kept, scratch.lowest, scratch.highest};
}

// Which slot holds the need-th key of the histogram, how many lie in slots before it, how many in
// it. Leaves the histogram zero.
template <int Threads>
VTP_DEVICE void find_slot(int need, SelectScratch<Threads>& scratch) {
  constexpr int kMine = SelectScratch<Threads>::kSlotsPerThread;
  const int first = static_cast<int>(threadIdx.x) * kMine;
  int counts[kMine], sum = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    counts[i] = scratch.slots[first + i];
    sum += counts[i];
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) scratch.slots[first + i] = 0;
  const int before = warp_exclusive_sum(sum);
  if (lane_id() == kWarp - 1) scratch.per_warp[warp_id()] = before + sum;
  __syncthreads();
  int above = before + warp_sum(lane_id() < warp_id() ? scratch.per_warp[lane_id()] : 0);
  if (above < need && need <= above + sum) {  // one thread
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (above < need && need <= above + counts[i]) {
        scratch.slot = first + i;
        scratch.above = above;
        scratch.count = counts[i];
      }
      above += counts[i];
    }
  }
  __syncthreads();
}

// A key such that `need` of the competing keys, 0 <= need <= census.competing, are those above it
// and some of those equal to it.
template <int Threads, class Keys>
VTP_DEVICE uint32_t find_cut(const Keys& keys, const Census& census, int need,
                             SelectScratch<Threads>& scratch) {
  if (need == 0) return kKeptKey - 1;
  if (need == census.competing) return kAbsentKey;
  uint32_t lowest = census.lowest, highest = census.highest;
  while (lowest != highest) {
    const uint32_t range = highest - lowest;
    const int bits = kWarp - __clz(static_cast<int>(range));
    const int shift = bits > scratch.kSlotBits ? bits - scratch.kSlotBits : 0;
    keys.for_each([&](int, uint32_t key) {
      const uint32_t below = highest - key;  // absent and kept keys lie outside of every range
      if (below <= range) atomicAdd(&scratch.slots[below >> shift], 1);
    });
    __syncthreads();
    find_slot(need, scratch);
    const int slot = scratch.slot, count = scratch.count;
    need -= scratch.above;
    highest -= static_cast<uint32_t>(slot) << shift;
    const uint32_t width = (1u << shift) - 1;
    lowest = highest - lowest > width ? highest - width : lowest;
    if (need == count) return lowest - 1;
  }
  return highest;
}

// Writes `count` tokens, ascending: those whose keys are above the cut, no more than count, and of
// those equal to it the first. Does not touch the rest of `indices`.
template <int Threads, class Keys>
VTP_DEVICE void emit(const Keys& keys, uint32_t cut, int count, int64_t* indices,
                     EmitScratch& scratch) {
  using Pair = typename Keys::Pair;
  constexpr int kHalf = sizeof(Pair) * 4;
  constexpr Pair kFirstHalf = (Pair{1} << kHalf) - 1;
  Pair mine = 0;  // keys above the cut, and above them keys equal to it
  keys.for_each([&](int, uint32_t key) {
    mine += key > cut ? 1 : key == cut ? Pair{1} << kHalf : 0;
  });
  mine = warp_sum(mine);
  if (lane_id() == 0) scratch.per_warp[warp_id()] = mine;
  __syncthreads();
  const bool is_warp = lane_id() < Threads / kWarp;
  const Pair of_warp = is_warp ? static_cast<Pair>(scratch.per_warp[lane_id()]) : Pair{0};
  const Pair before = warp_exclusive_sum(of_warp);
  const Pair all = __shfl_sync(kAllLanes, before + of_warp, kWarp - 1);
  const int ties = count - static_cast<int>(all & kFirstHalf);
  const Pair start = __shfl_sync(kAllLanes, before, warp_id());

  int above = static_cast<int>(start & kFirstHalf), equal = static_cast<int>(start >> kHalf);
  const unsigned lanes_before = (1u << lane_id()) - 1;
  keys.for_each([&](int token, uint32_t key) {
    const unsigned above_here = __ballot_sync(kAllLanes, key > cut);
    const unsigned equal_here = __ballot_sync(kAllLanes, key == cut);
    if ((above_here | equal_here) == 0) return;
    const int place = above + __popc(above_here & lanes_before);
    bool taken = key > cut;
    int tie = equal;
    if (equal_here != 0) {
      tie += __popc(equal_here & lanes_before);
      taken = taken || (key == cut && tie < ties);
      equal += __popc(equal_here);
    }
    if (taken) indices[place + (tie < ties ? tie : ties)] = token;
    above += __popc(above_here);
  });
}

}  // namespace vtp::cuda
