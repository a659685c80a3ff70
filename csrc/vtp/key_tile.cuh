// Dot products of keys with queries, one warp's share: its keys stay in registers for as many
// queries as come by in shared memory, eight or sixteen at a time.
//
// Keys are read straight from global memory: a load of a warp takes 64 contiguous bytes of each of
// eight keys, 16 bytes a lane, and all loads of a lane are independent. Nothing sorts them into the
// layout the tensor core documents, because a dot product does not mind in which order its terms
// come: the words of a unit of 16 bytes serve as operands as they are, if keys and queries agree.
// With g = lane / 4 and t = lane % 4, words 0 and 1 of unit t of key g are one operand B, words 2
// and 3 the next; of queries g and g + 8 the same words, interleaved, are operand A, and lie so in
// shared memory.
// float32 has no such instruction. Four lanes share a key, a unit each, and multiply it with eight
// queries; they add up by trading sums.
//
// Either way a lane ends with the products of its one or two queries and keys 2 t, 2 t + 1 of every
// group of eight.
#pragma once

#include "mma.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace vtp::cuda {

// Rows of up to 64 * Chunks bytes, aligned to 16.
template <class T, int Chunks>
struct KeyTile {
  static constexpr bool kTensorCore = sizeof(T) == 2;
  static constexpr int kUnitSize = kVectorSize<T>;      // elements of a unit of 16 bytes
  static constexpr int kGroups = Chunks <= 4 ? 4 : 2;   // of eight keys, in 64 registers, mostly
  static constexpr int kKeys = 8 * kGroups;             // a warp
  static constexpr int kLaneQueries = kTensorCore ? 2 : 1;
  static constexpr int kQueries = 8 * kLaneQueries;     // at a time
  static constexpr int kQueryUnits = kQueries * 4 * Chunks;  // the shared memory they take

  // Of query i and key (n, j) of a lane.
  struct Products {
    float x[kGroups][4];

    VTP_DEVICE float at(int i, int n, int j) const { return x[n][2 * i + j]; }
  };

  int4 unit[kGroups][Chunks];

  // Which of the queries at hand, which of the warp's keys.
  static VTP_DEVICE int query_of(int i) {
    const int g = lane_id() / 4;
    return kTensorCore ? g + 8 * i : g % 4 * 2 + g / 4;
  }
  static VTP_DEVICE int key_of(int n, int j) { return 8 * n + lane_id() % 4 * 2 + j; }

  // Keys keys[0 ... kKeys) of `dim` elements, as far as their bits are set in `read`; the others
  // are taken as zero.
  VTP_DEVICE void load(const T* keys, int64_t stride, unsigned read, int dim) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const int key = kTensorCore ? g : 2 * t + g / 4, first = kTensorCore ? t : g % 4;
    const T* row = keys + key * stride + first * kUnitSize;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      const int row_dim = (read >> (8 * n + key)) & 1 ? dim : 0;
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        const bool inside = (4 * c + first) * kUnitSize < row_dim;
        unit[n][c] = int4{0, 0, 0, 0};
        if (inside) unit[n][c] = *reinterpret_cast<const int4*>(row + 4 * c * kUnitSize);
      }
      row += 8 * stride;
    }
  }

  // Puts units 4 c + t of queries g and, for the tensor core, g + 8 where multiply() wants them.
  static VTP_DEVICE void store_query(int4* queries, int c, const int4 (&q)[kLaneQueries]) {
    if constexpr (kTensorCore) {
      int4* out = queries + 2 * c * kWarp + lane_id();
      out[0] = int4{q[0].x, q[1].x, q[0].y, q[1].y};
      out[kWarp] = int4{q[0].z, q[1].z, q[0].w, q[1].w};
    } else {
      queries[c * kWarp + lane_id()] = q[0];
    }
  }

  // With kQueries queries of `dim` elements.
  VTP_DEVICE Products multiply(const int4* queries, int dim) const {
    const int chunks = static_cast<int>(divide_up(dim, 4 * kUnitSize));
    if constexpr (kTensorCore) {
      return multiply_by_tensor_core(queries, chunks);
    } else {
      return multiply_by_lanes(queries, chunks);
    }
  }

 private:
  static VTP_DEVICE uint32_t word(int bits) { return static_cast<uint32_t>(bits); }

  // Shorter rows than half the tile have a tile of their own, so half needs no test.
  static VTP_DEVICE bool has_chunk(int c, int chunks) { return 2 * c < Chunks || c < chunks; }

  VTP_DEVICE Products multiply_by_tensor_core(const int4* queries, int chunks) const {
    // At least four sums under way, to cover the latency of the instruction.
    constexpr int kChains = kGroups < 4 ? 2 : 1;
    Products sum[kChains] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (!has_chunk(c, chunks)) continue;
      const int4 a = queries[2 * c * kWarp + lane_id()];
      const int4 b = queries[(2 * c + 1) * kWarp + lane_id()];
      const uint32_t low[4] = {word(a.x), word(a.y), word(a.z), word(a.w)};
      const uint32_t high[4] = {word(b.x), word(b.y), word(b.z), word(b.w)};
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        mma<T>(sum[0].x[n], low, {word(unit[n][c].x), word(unit[n][c].y)});
      }
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        mma<T>(sum[kChains - 1].x[n], high, {word(unit[n][c].z), word(unit[n][c].w)});
      }
    }
    if constexpr (kChains == 2) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[0].x[n][i] += sum[1].x[n][i];
      }
    }
    return sum[0];
  }

  VTP_DEVICE Products multiply_by_lanes(const int4* queries, int chunks) const {
    float sum[kGroups][8] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (!has_chunk(c, chunks)) continue;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const int4 query = queries[c * kWarp + 4 * q + lane_id() / 4 % 4];
#pragma unroll
        for (int n = 0; n < kGroups; ++n) sum[n][q] = add_products(unit[n][c], query, sum[n][q]);
      }
    }
    // A lane goes on with half of its sums, and half of them, adding what others have of these.
    // Lanes 16 apart hold neighbouring keys: they part with one of two queries.
    Products products = {};
    const bool upper = lane_id() & 16;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float half[4], quarter[2];
#pragma unroll
      for (int q = 0; q < 4; ++q) half[q] = trade(sum[n][q], sum[n][q + 4], 8);
#pragma unroll
      for (int q = 0; q < 2; ++q) quarter[q] = trade(half[q], half[q + 2], 4);
      const float other = __shfl_xor_sync(kAllLanes, upper ? quarter[0] : quarter[1], 16);
      products.x[n][0] = upper ? other : quarter[0];
      products.x[n][1] = upper ? quarter[1] : other;
    }
    return products;
  }

  static VTP_DEVICE float add_products(const int4& a, const int4& b, float sum) {
    sum = fmaf(__int_as_float(a.x), __int_as_float(b.x), sum);
    sum = fmaf(__int_as_float(a.y), __int_as_float(b.y), sum);
    sum = fmaf(__int_as_float(a.z), __int_as_float(b.z), sum);
    return fmaf(__int_as_float(a.w), __int_as_float(b.w), sum);
  }

  // Two lanes add up two sums, each lane one: the upper lane the second.
  static VTP_DEVICE float trade(float first, float second, int distance) {
    const bool upper = lane_id() & distance;
    const float given = __shfl_xor_sync(kAllLanes, upper ? first : second, distance);
    return (upper ? second : first) + given;
  }
};

}  // namespace vtp::cuda
