// Dot products of many keys with many queries, one warp's share: its keys stay in registers, queries
// come from shared memory, eight or sixteen at a time.
//
// With g = lane / 4 and t = lane % 4, a lane holds 16-byte units t, t + 4, t + 8 ... of keys g,
// g + 8, ...: one load instruction of a warp reads 64 contiguous bytes of eight keys, straight from
// global memory, and all loads of a lane are independent. Nothing is sorted into the operand layout
// of the tensor core: a dot product does not mind in which order its terms come, so a unit's four
// words simply serve as the words the instruction wants, for keys and queries alike.
// float32 has no such instruction: a lane multiplies its own units, and four lanes add up.
//
// Either way lane (g, t) ends with the products of keys g + 8 i and queries 2 t, 2 t + 1 of every
// group of eight.
#pragma once

#include <climits>

#include "async_copy.cuh"
#include "mma.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace vtp::cuda {

// Elements [first, first + kVectorSize) of a row of `dim`; zeros beyond its end.
template <class T>
VTP_DEVICE int4 load_unit(const T* row, int first, int dim, bool aligned) {
  if (aligned) {
    if (first < dim) return *reinterpret_cast<const int4*>(row + first);
    return int4{0, 0, 0, 0};
  }
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    vector.x[i] = first + i < dim ? row[first + i] : from_float<T>(0.0f);
  }
  int4 bits;
  memcpy(&bits, &vector, sizeof bits);
  return bits;
}

// Chunks: of 64 bytes, enough for the rows served.
template <class T, int Chunks>
struct KeyTile {
  static constexpr bool kTensorCore = sizeof(T) == 2;
  static constexpr int kUnits = 4 * Chunks;                   // 16-byte units a row
  static constexpr int kUnitSize = kVectorSize<T>;            // elements a unit
  static constexpr int kSixteens = Chunks <= 4 ? 2 : 1;       // keys a warp, in sixteens
  static constexpr int kWarpKeys = 16 * kSixteens;            // 64 registers a lane, mostly
  static constexpr int kKeys = 2 * kSixteens;                 // keys a lane
  static constexpr int kEights = kTensorCore ? 2 : 1;         // queries at a time, in eights
  static constexpr int kQueries = 8 * kEights;                //
  static constexpr int kColumns = 2 * kEights;                // queries a lane has products of
  static_assert(Chunks >= 2);

  // Of key i and column c of this lane.
  struct Products {
    float x[kSixteens][kEights][4];

    VTP_DEVICE float at(int i, int c) const { return x[i / 2][c / 2][i % 2 * 2 + c % 2]; }
  };

  int4 unit[kKeys][Chunks];

  // Which key of the warp's, which of the queries at hand.
  static VTP_DEVICE int key_of(int i) { return 8 * i + lane_id() / 4; }
  static VTP_DEVICE int query_of(int c) { return c / 2 * 8 + lane_id() % 4 * 2 + c % 2; }

  // Where unit u of a query lies in shared memory. Eight lanes at a time read four units of two
  // neighbouring rows, which the swap puts into different banks.
  static VTP_DEVICE int place(int query, int u) { return query * kUnits + (u ^ (query % 2 * 4)); }

  // The keys whose position is not INT_MAX; the others are taken as zero and not read.
  VTP_DEVICE void load(const T* keys, int64_t stride, const int (&position)[kKeys], int dim,
                       bool aligned) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const bool read = position[i] != INT_MAX;
      const T* row = keys + (read ? position[i] : 0) * stride;
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        const int first = (4 * c + lane_id() % 4) * kUnitSize;
        unit[i][c] = load_unit(row, first, read ? dim : 0, aligned);
      }
    }
  }

  // With the kQueries queries of `dim` elements that begin at `queries`, laid out by place().
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
    Products products = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (!has_chunk(c, chunks)) continue;
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        const int4 q = queries[place(8 * n + lane_id() / 4, 4 * c + lane_id() % 4)];
        const uint32_t low[2] = {word(q.x), word(q.y)}, high[2] = {word(q.z), word(q.w)};
#pragma unroll
        for (int m = 0; m < kSixteens; ++m) {
          const int4 a = unit[2 * m][c], b = unit[2 * m + 1][c];
          mma<T>(products.x[m][n], {word(a.x), word(b.x), word(a.y), word(b.y)}, low);
          mma<T>(products.x[m][n], {word(a.z), word(b.z), word(a.w), word(b.w)}, high);
        }
      }
    }
    return products;
  }

  // Every lane multiplies its units of all eight queries; then half of the unfinished sums go to
  // the lane two away, and half of the rest to the neighbour.
  VTP_DEVICE Products multiply_by_lanes(const int4* queries, int chunks) const {
    float sum[kKeys][8] = {};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (!has_chunk(c, chunks)) continue;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int4 q = queries[place(n, 4 * c + lane_id() % 4)];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) sum[i][n] = add_products(unit[i][c], q, sum[i][n]);
      }
    }
    const bool upper_half = lane_id() & 2, upper_quarter = lane_id() & 1;
    Products products;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) half[n] = trade(sum[i][n], sum[i][n + 4], upper_half, 2);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        products.x[i / 2][0][i % 2 * 2 + n] = trade(half[n], half[n + 2], upper_quarter, 1);
      }
    }
    return products;
  }

  static VTP_DEVICE float add_products(const int4& a, const int4& b, float sum) {
    sum = fmaf(__int_as_float(a.x), __int_as_float(b.x), sum);
    sum = fmaf(__int_as_float(a.y), __int_as_float(b.y), sum);
    sum = fmaf(__int_as_float(a.z), __int_as_float(b.z), sum);
    return fmaf(__int_as_float(a.w), __int_as_float(b.w), sum);
  }

  // Of two sums, both lanes of a pair add up one: the upper lane the second.
  static VTP_DEVICE float trade(float first, float second, bool upper, int distance) {
    const float given = __shfl_xor_sync(kAllLanes, upper ? first : second, distance);
    return (upper ? second : first) + given;
  }
};

}  // namespace vtp::cuda
