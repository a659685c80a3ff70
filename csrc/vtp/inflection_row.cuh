// inflection for one row by one block.
#pragma once

#include "block_select.cuh"
#include "block_sort.cuh"
#include "knee.cuh"
#include "vector.cuh"

namespace vtp::cuda {

template <int Threads>
struct InflectionScratch {
  KneeScratch<Threads> knee;
  EmitScratch emit;
  int above, finite;
};

// A Source (block_select.cuh) of all scores of a row in memory.
template <class T>
struct CurveSource {
  template <int Count>
  struct Batch {
    float scores[Count];
  };

  template <int Count>
  VTP_DEVICE Batch<Count> fetch(int token, int inside) const {
    Batch<Count> batch;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      batch.scores[i] = i * kWarp < inside ? to_float(scores[token + i * kWarp]) : 0.0f;
    }
    return batch;
  }

  template <int Count>
  VTP_DEVICE uint32_t key(const Batch<Count>& batch, int i) const {
    return sortable(batch.scores[i]);
  }

  const T* scores;
};

// How many keys a row is sorted in; never fewer than Threads.
__host__ __device__ constexpr unsigned padded_size(int64_t size) {
  unsigned padded = kSegment;
  while (padded < size) padded *= 2;
  return padded;
}

// Copies the keys to `sorted`, fills up with the lowest, and counts +inf and the finite ones.
template <int Threads, class Keys>
VTP_DEVICE void lay_out(const Keys& keys, int size, uint32_t* sorted, unsigned padded,
                        InflectionScratch<Threads>& scratch) {
  if (threadIdx.x == 0) scratch.above = scratch.finite = 0;
  __syncthreads();
  int above = 0, finite = 0;
  keys.for_each([&](int token, uint32_t key) {  // the row rounded up to Threads, no more
    sorted[static_cast<unsigned>(token)] = key;
    above += key == kInfinityKey;
    finite += kMinusInfinityKey < key && key < kInfinityKey;
  });
  const unsigned laid_out = (static_cast<unsigned>(size) + Threads - 1) / Threads * Threads;
  for (unsigned i = laid_out + threadIdx.x; i < padded; i += Threads) sorted[i] = kAbsentKey;
  above = warp_sum(above);
  finite = warp_sum(finite);
  if (lane_id() == 0) {
    atomicAdd(&scratch.above, above);
    atomicAdd(&scratch.finite, finite);
  }
  __syncthreads();
}

// keys: HeldKeys or StreamedKeys of the row, none absent. sorted: room for padded_size(size) keys,
// aligned to 16 bytes. Every thread of the block calls it.
template <int Threads, class Keys>
VTP_DEVICE void inflect_row(const Inflection& a, int64_t row, const Keys& keys, uint32_t* sorted,
                            InflectionScratch<Threads>& scratch) {
  const int size = static_cast<int>(a.curve.size[1]);
  const unsigned padded = padded_size(size);
  lay_out(keys, size, sorted, padded, scratch);
  sort_descending<Threads>(sorted, padded);
  const int above = scratch.above;
  const int knee = find_knee(a, sorted + above, scratch.finite, scratch.knee);

  int64_t count = knee < 0 ? size : int64_t{above} + knee + 1;
  if (count < a.min_keep) count = a.min_keep;
  if (count > a.capacity) count = a.capacity;
  int64_t* indices = a.indices + row * a.capacity;
  for (int64_t i = count + threadIdx.x; i < a.capacity; i += Threads) indices[i] = -1;
  if (threadIdx.x == 0) a.counts[row] = static_cast<int32_t>(count);
  if (count == 0) return;
  emit<Threads>(keys, sorted[count - 1], static_cast<int>(count), indices, scratch.emit);
}

}  // namespace vtp::cuda
