// select_topk for one row, whatever the scores are made of, by one block or by a cluster of them.
#pragma once

#include "block_select.cuh"
#include "cluster_select.cuh"
#include "vector.cuh"

namespace vtp::cuda {

// An int32 or int64 as it lies in memory, even lanes of a warp holding its lower word and odd ones
// the upper. To widen it where it is loaded would wait for it, before anything else is asked for;
// and so would nvcc for a value that it knows to be the same in all lanes.
struct RawInteger {
  int word;
  bool is_int64;

  VTP_DEVICE static RawInteger of(int64_t x) {
    return {static_cast<int>(lane_id() % 2 == 0 ? x : x >> 32), true};
  }

  VTP_DEVICE static RawInteger load(const Integers<1>& integers, int64_t i) {
    const int* words = static_cast<const int*>(integers.data);
    const int64_t at = i * integers.stride[0];
    return {words[integers.is_int64 ? 2 * at + lane_id() % 2 : at], integers.is_int64};
  }

  // By a whole warp.
  VTP_DEVICE int64_t value() const {
    const int low = __shfl_sync(kAllLanes, word, 0), high = __shfl_sync(kAllLanes, word, 1);
    const auto bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                      static_cast<uint32_t>(low);
    return is_int64 ? static_cast<int64_t>(bits) : low;
  }
};

// One row of a SelectTopk, but for the scores.
struct SelectRow {
  const MaskByte *candidates, *keep;  // null: all, none
  bool has_threshold;
  float threshold;
  RawInteger k;
  int64_t capacity;
  int64_t* indices;
  int32_t* count;
};

VTP_DEVICE SelectRow select_row_of(const SelectTopk& a, int64_t row) {
  return {a.candidates ? a.candidates.at(row) : nullptr,
          a.keep ? a.keep.at(row) : nullptr,
          a.has_threshold,
          static_cast<float>(a.threshold),
          a.k_per_row ? RawInteger::load(a.k_per_row, row) : RawInteger::of(a.k),
          a.capacity,
          a.indices + row * a.capacity,
          a.counts + row};
}

// A Source (block_select.cuh) of keys from scores. `Score` is a functor: float score(int token),
// called for tokens inside the row alone.
template <class Score>
class SelectSource {
 public:
  template <int Count>
  struct Batch {
    float scores[Count];
    unsigned candidates, kept;  // a bit each
  };

  VTP_DEVICE SelectSource(const Score& score, const SelectRow& row)
      : score_(score), candidates_(row.candidates), keep_(row.keep) {
    const bool can_pass = row.threshold == row.threshold;  // nothing exceeds a threshold of NaN
    if (row.has_threshold) floor_ = can_pass ? sortable(row.threshold) : kKeptKey;
  }

  // From here on only the kept tokens take part, ranked by their scores.
  VTP_DEVICE void let_kept_compete() {
    kept_bits_ = 0;
    floor_ = kKeptKey;
  }

  template <int Count>
  VTP_DEVICE Batch<Count> fetch(int token, int inside) const {
    Batch<Count> batch;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      batch.scores[i] = i * kWarp < inside ? score_(token + i * kWarp) : 0.0f;
    }
    unsigned candidate[Count], kept[Count];
    fetch_bytes(candidates_, token, inside, candidate);
    fetch_bytes(keep_, token, inside, kept);
    batch.candidates = bits_of(candidate) | (candidates_ ? 0 : ~0u);
    batch.kept = bits_of(kept);
    return batch;
  }

  template <int Count>
  VTP_DEVICE uint32_t key(const Batch<Count>& batch, int i) const {
    const uint32_t key = sortable(batch.scores[i]);
    const bool competes = (batch.candidates >> i & 1) != 0 && key > floor_;  // NaN exceeds nothing
    return (batch.kept >> i & 1) != 0 ? key | kept_bits_ : competes ? key : kAbsentKey;
  }

 private:
  template <int Count>
  VTP_DEVICE static void fetch_bytes(const MaskByte* mask, int token, int inside,
                                     unsigned (&bytes)[Count]) {
    if (mask == nullptr) inside = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      bytes[i] = i * kWarp < inside ? mask[token + i * kWarp].byte : 0;
    }
  }

  // Which bytes are not 0.
  template <int Count>
  VTP_DEVICE static unsigned bits_of(const unsigned (&bytes)[Count]) {
    static_assert(Count <= 24);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      // Bit 8 of 255 more says so. Compared, each would be waited for by itself.
      bits |= ((bytes[i] << i) + (255u << i)) & (256u << i);
    }
    return bits >> 8;
  }

  Score score_;
  const MaskByte *candidates_, *keep_;
  uint32_t floor_ = kAbsentKey;  // the key of the threshold
  uint32_t kept_bits_ = kKeptKey;
};

// How many of the competing tokens are taken, where the kept ones fit.
VTP_DEVICE int need_of(const SelectRow& row, const Census& census) {
  int64_t need = row.k.value();
  if (need < 0) need = 0;
  if (need > census.competing) need = census.competing;
  if (need > row.capacity - census.kept) need = row.capacity - census.kept;
  return static_cast<int>(need);
}

// Says how many tokens were taken and fills up with -1; `thread` is one of `threads` that do it.
VTP_DEVICE void write_rest(const SelectRow& row, int64_t count, int thread, int threads) {
  if (thread == 0) *row.count = static_cast<int32_t>(count);
  for (int64_t i = count + thread; i < row.capacity; i += threads) row.indices[i] = -1;
}

// What is left to do once it is known how many tokens there are.
template <int Threads, class Keys>
VTP_DEVICE void select_from(const Keys& keys, const Census& census, const SelectRow& row,
                            SelectScratch<Threads>& scratch) {
  const int need = need_of(row, census), count = census.kept + need;
  write_rest(row, count, static_cast<int>(threadIdx.x), Threads);
  if (count == 0) return;
  const uint32_t cut = find_cut(keys, census, need, scratch);
  emit<Threads>(keys, cut, count, row.indices, scratch.emit);
}

// The whole row. make_keys(source) returns HeldKeys or StreamedKeys of that source. Every thread of
// the block calls it; scores are asked for after a barrier, once by HeldKeys (twice where the kept
// rows exceed the capacity), several times by StreamedKeys, those of a token always by the same
// thread.
template <int Threads, class Score, class MakeKeys>
VTP_DEVICE void select_row(const Score& score, const SelectRow& row, const MakeKeys& make_keys,
                           SelectScratch<Threads>& scratch) {
  SelectSource<Score> source(score, row);
  SelectRow rest = row;
#pragma unroll 1  // one copy of the code is enough
  for (;;) {
    select_prepare(scratch);
    const auto keys = make_keys(source);
    const Census census = take_census(keys, scratch);
    if (census.kept <= row.capacity) return select_from(keys, census, rest, scratch);
    source.let_kept_compete();
    rest.k = RawInteger::of(row.capacity);
    __syncthreads();  // all have read the census
  }
}

// Rows of up to Threads * KeysPerThread tokens; scores are asked for as few times as can be.
template <int Threads, int KeysPerThread, class Score>
VTP_DEVICE void select_held_row(const Score& score, int size, const SelectRow& row,
                                SelectScratch<Threads>& scratch) {
  const auto make_keys = [&](const auto& source) {
    HeldKeys<Threads, KeysPerThread> keys;
    keys.load(source, size);
    return keys;
  };
  select_row(score, row, make_keys, scratch);
}

// Rows of any length.
template <int Threads, class Score>
VTP_DEVICE void select_streamed_row(const Score& score, int size, const SelectRow& row,
                                    SelectScratch<Threads>& scratch) {
  const auto make_keys = [&](const auto& source) {
    return StreamedKeys<Threads, SelectSource<Score>>(source, size);
  };
  select_row(score, row, make_keys, scratch);
}

// A row of up to kClusterBlocks * Threads * KeysPerThread tokens by a cluster, each block of which
// asks for the scores of its run, after a barrier. The blocks must have come to cluster_arrive once
// before, and end with cluster_wait.
template <int Threads, int KeysPerThread, class Score>
VTP_DEVICE void select_cluster_row(const Score& score, int size, const SelectRow& row,
                                   ClusterScratch<Threads>& scratch) {
  SelectSource<Score> source(score, row);
  SelectRow rest = row;
  const Run run = run_of_block(size);
#pragma unroll 1
  for (bool all_have_begun = false;; all_have_begun = true) {
    cluster_prepare(scratch);
    HeldKeys<Threads, KeysPerThread> keys;
    keys.load(source, run.size, run.begin);
    if (!all_have_begun) cluster_wait();
    const ClusterCensus census = take_cluster_census(keys, scratch);
    if (census.all.kept <= row.capacity) {
      const int need = need_of(rest, census.all), count = census.all.kept + need;
      const ClusterCut cut = find_cluster_cut(keys, census, need, scratch);
      cluster_arrive();  // no more is read from other blocks
      write_rest(row, count, cluster_rank() * Threads + static_cast<int>(threadIdx.x),
                 kClusterBlocks * Threads);
      return emit_share<Threads>(keys, cut, row.indices, scratch.emit);
    }
    source.let_kept_compete();
    rest.k = RawInteger::of(row.capacity);
    cluster_sync();  // all have read the census
  }
}

// A row of scores in memory.
template <class T>
struct ScoreRow {
  const T* scores;

  VTP_DEVICE float operator()(int token) const { return to_float(scores[token]); }
};

}  // namespace vtp::cuda
