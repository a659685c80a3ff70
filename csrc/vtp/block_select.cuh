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

// Keys in registers, fetched once: runs of up to Threads * KeysPerThread tokens.
template <int Threads, int KeysPerThread>
class HeldKeys {
 public:
  static constexpr int kCapacity = Threads * KeysPerThread;
  static_assert(kCapacity < 1 << 16);
  using Pair = uint32_t;  // two counts of tokens, 16 bits each

  // The `size` tokens from `begin` on.
  template <class Source>
  VTP_DEVICE void load(const Source& source, int size, int begin = 0) {
    constexpr int kMost = kFetchBatch<Threads>;
    constexpr int kBatch = KeysPerThread < kMost ? KeysPerThread : kMost;
    static_assert(KeysPerThread % kBatch == 0);
    words_ = (size + Threads - 1) / Threads;
    const int first = warp_id() * words_ * kWarp + lane_id();
    first_ = begin + first;
    const int inside = size - first < words_ * kWarp ? size - first : words_ * kWarp;
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

struct alignas(16) Census {
  int competing, kept;
  uint32_t lowest, highest;  // of the keys that compete
};

VTP_DEVICE Census census_of_none() { return {0, 0, kKeptKey, kAbsentKey}; }

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
  Census census;
  int slot, above, count;
};

template <int Threads>
VTP_DEVICE void select_prepare(SelectScratch<Threads>& scratch) {
#pragma unroll
  for (int i = 0; i < scratch.kSlotsPerThread; ++i) scratch.slots[i * Threads + threadIdx.x] = 0;
  if (threadIdx.x == 0) scratch.census = census_of_none();
  __syncthreads();
}

// Adds the thread's keys to a census in shared memory.
template <class Keys>
VTP_DEVICE void count_in(const Keys& keys, Census& census) {
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
    atomicAdd(&census.competing, static_cast<int>(counts & ((Pair{1} << kHalf) - 1)));
    atomicAdd(&census.kept, static_cast<int>(counts >> kHalf));
    atomicMax(&census.highest, highest);
    atomicMin(&census.lowest, before_lowest + 1);
  }
}

// To be called once after select_prepare.
template <int Threads, class Keys>
VTP_DEVICE Census take_census(const Keys& keys, SelectScratch<Threads>& scratch) {
  count_in(keys, scratch.census);
  __syncthreads();
  return scratch.census;
}

// Keys among which the cut is sought. Slots divide them evenly, from the highest key down.
struct KeyRange {
  uint32_t lowest, highest;

  VTP_DEVICE bool is_one_key() const { return lowest == highest; }

  // A slot holds 2^shift keys.
  VTP_DEVICE int shift(int slot_bits) const {
    const int bits = kWarp - __clz(static_cast<int>(highest - lowest));
    return bits > slot_bits ? bits - slot_bits : 0;
  }

  // Counts the thread's keys by slot. Absent and kept keys lie outside of every range.
  template <class Keys>
  VTP_DEVICE void count(const Keys& keys, int shift, int* slots) const {
    keys.for_each([&](int, uint32_t key) {
      const uint32_t below = highest - key;
      if (below <= highest - lowest) atomicAdd(&slots[below >> shift], 1);
    });
  }

  VTP_DEVICE void narrow(int slot, int shift) {
    highest -= static_cast<uint32_t>(slot) << shift;
    const uint32_t width = (1u << shift) - 1;
    lowest = highest - lowest > width ? highest - width : lowest;
  }
};

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
  KeyRange range = {census.lowest, census.highest};
  while (!range.is_one_key()) {
    const int shift = range.shift(scratch.kSlotBits);
    range.count(keys, shift, scratch.slots);
    __syncthreads();
    find_slot(need, scratch);
    const int count = scratch.count;
    need -= scratch.above;
    range.narrow(scratch.slot, shift);
    if (need == count) return range.lowest - 1;
  }
  return range.highest;
}

// Keys above a cut, and in the upper half keys equal to it.
template <class Pair>
struct CutCounts {
  static constexpr int kHalf = sizeof(Pair) * 4;

  Pair before;  // those of the warps before
  Pair all;     // those of the block

  static VTP_DEVICE int above(Pair x) { return static_cast<int>(x & ((Pair{1} << kHalf) - 1)); }
  static VTP_DEVICE int equal(Pair x) { return static_cast<int>(x >> kHalf); }
};

template <int Threads, class Keys>
VTP_DEVICE CutCounts<typename Keys::Pair> count_at_cut(const Keys& keys, uint32_t cut,
                                                       EmitScratch& scratch) {
  using Pair = typename Keys::Pair;
  constexpr int kHalf = CutCounts<Pair>::kHalf;
  Pair mine = 0;
  keys.for_each([&](int, uint32_t key) {
    mine += key > cut ? 1 : key == cut ? Pair{1} << kHalf : 0;
  });
  mine = warp_sum(mine);
  if (lane_id() == 0) scratch.per_warp[warp_id()] = mine;
  __syncthreads();
  const bool is_warp = lane_id() < Threads / kWarp;
  const Pair of_warp = is_warp ? static_cast<Pair>(scratch.per_warp[lane_id()]) : Pair{0};
  const Pair before = warp_exclusive_sum(of_warp);
  return {__shfl_sync(kAllLanes, before, warp_id()),
          __shfl_sync(kAllLanes, before + of_warp, kWarp - 1)};
}

// Writes the warp's tokens whose keys are above the cut and, of those equal to it, the first `ties`
// of the row. `above` and `equal` count those of either kind that lie before the warp's.
template <class Keys>
VTP_DEVICE void write_tokens(const Keys& keys, uint32_t cut, int above, int equal, int ties,
                             int64_t* indices) {
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

// Writes `count` tokens, ascending: those whose keys are above the cut, no more than count, and of
// those equal to it the first. Does not touch the rest of `indices`.
template <int Threads, class Keys>
VTP_DEVICE void emit(const Keys& keys, uint32_t cut, int count, int64_t* indices,
                     EmitScratch& scratch) {
  using Counts = CutCounts<typename Keys::Pair>;
  const Counts counts = count_at_cut<Threads>(keys, cut, scratch);
  const int ties = count - Counts::above(counts.all);
  write_tokens(keys, cut, Counts::above(counts.before), Counts::equal(counts.before), ties,
               indices);
}

}  // namespace vtp::cuda
