// Rows of up to 256 elements in registers, eight elements a lane: a row is spread over a group of
// 8, 16 or 32 neighbouring lanes, so one kernel serves every width and a warp reads four, two or
// one rows at once, sixteen bytes a lane.
//
// Which eight columns a lane holds depends on the type (RowShape::column). Vectors of float32 that
// meet such rows, like queries and outputs, are kept in the order of the lanes' registers, padded
// with zeros to RowShape::width(): a lane reads its share of them in two accesses of sixteen bytes,
// neighbouring lanes neighbouring bytes.
#pragma once

#include "vector.cuh"
#include "warp.cuh"

namespace vtp::cuda {

constexpr int kLaneElements = 8;

struct RowShape {
  int dim;        // at most 256
  int log_lanes;  // 3, 4 or 5

  static RowShape of(int64_t dim) {
    return {static_cast<int>(dim), dim <= 8 * kLaneElements    ? 3
                                   : dim <= 16 * kLaneElements ? 4
                                                               : 5};
  }

  VTP_INLINE int lanes() const { return 1 << log_lanes; }
  VTP_INLINE int log_width() const { return log_lanes + 3; }
  VTP_INLINE int width() const { return 1 << log_width(); }
  // This thread's group in its block, or in its warp, and its lane there.
  VTP_DEVICE int group() const { return static_cast<int>(threadIdx.x) >> log_lanes; }
  VTP_DEVICE int group_of_warp() const { return lane_id() >> log_lanes; }
  VTP_DEVICE int lane() const { return lane_id() & (lanes() - 1); }

  // The column of a lane's element: sixteen bytes of a row together.
  template <class T>
  VTP_DEVICE int column(int lane, int element) const {
    constexpr int kSize = kVectorSize<T>;
    return element / kSize * (kSize << log_lanes) + lane * kSize + element % kSize;
  }

  // The same for a place in a vector that is kept in the order of registers.
  template <class T>
  VTP_DEVICE int column_at(int place) const {
    const int row = place >> (log_lanes + 2), rest = place & ((4 << log_lanes) - 1);
    return column<T>(rest / 4, row * 4 + rest % 4);
  }
};

// The elements in a word of memory. Taken apart as a whole word: told to read two members of a
// struct, the compiler splits it where it is loaded, which makes loads wait for each other.
template <class T>
struct Word {
  static constexpr int kSize = 4 / static_cast<int>(sizeof(T));

  static VTP_DEVICE void widen(uint32_t word, float* out) {
    if constexpr (std::is_same_v<T, float>) {
      out[0] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[0] = __uint_as_float(word << 16);
      out[1] = __uint_as_float(word & 0xffff0000u);
    } else {
      __half2 pair;
      memcpy(&pair, &word, sizeof pair);
      const float2 wide = __half22float2(pair);
      out[0] = wide.x;
      out[1] = wide.y;
    }
  }
};

template <class T>
VTP_DEVICE void widen_vector(uint4 bits, float* out) {
  Word<T>::widen(bits.x, out);
  Word<T>::widen(bits.y, out + Word<T>::kSize);
  Word<T>::widen(bits.z, out + 2 * Word<T>::kSize);
  Word<T>::widen(bits.w, out + 3 * Word<T>::kSize);
}

// A lane's share of a row as memory holds it, of 16-bit elements half the registers they become.
template <class T>
struct RowPart {
  static constexpr int kVectors = kLaneElements / kVectorSize<T>;
  uint4 bits[kVectors];

  VTP_DEVICE void widen(float (&out)[kLaneElements]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) widen_vector<T>(bits[v], out + v * kVectorSize<T>);
  }
};

// Rows 0 ... Rows - 1 from `row` on, those whose bit is set; the others, and what lies past the end
// of a row, are zeros and not read. `Once` spares the cache: what it holds will be wanted again,
// these rows will not.
template <bool Aligned, bool Once = false, class T, int Rows>
VTP_DEVICE void load_parts(const T* row, int64_t stride, RowShape shape, unsigned wanted,
                           RowPart<T> (&out)[Rows]) {
  const int column = shape.column<T>(shape.lane(), 0), left = shape.dim - column;
  const T* source = row + column;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const bool is_wanted = (wanted >> r & 1) != 0;
#pragma unroll
    for (int v = 0; v < RowPart<T>::kVectors; ++v) {
      const int first = v * (kVectorSize<T> << shape.log_lanes);
      if constexpr (Aligned) {
        out[r].bits[v] = uint4{0, 0, 0, 0};
        if (is_wanted && first < left) {
          const uint4* vector = reinterpret_cast<const uint4*>(source + first);
          out[r].bits[v] = Once ? __ldcs(vector) : *vector;
        }
      } else {
        Vector<T> vector;
#pragma unroll
        for (int i = 0; i < kVectorSize<T>; ++i) {
          const bool is_inside = is_wanted && first + i < left;
          vector.x[i] = is_inside ? source[first + i] : from_float<T>(0.0f);
        }
        memcpy(&out[r].bits[v], &vector, sizeof vector);
      }
    }
    source += stride;
  }
}

template <class T, int Rows>
VTP_DEVICE void widen_parts(const RowPart<T> (&parts)[Rows], float (&out)[Rows][kLaneElements]) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) parts[r].widen(out[r]);
}

// A lane's share of a vector kept in the order of registers.
VTP_DEVICE void load_share(const float* vector, RowShape shape, float (&out)[kLaneElements]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 part =
        reinterpret_cast<const float4*>(vector)[(half << shape.log_lanes) + shape.lane()];
    out[half * 4] = part.x;
    out[half * 4 + 1] = part.y;
    out[half * 4 + 2] = part.z;
    out[half * 4 + 3] = part.w;
  }
}

VTP_DEVICE void store_share(const float (&x)[kLaneElements], RowShape shape, float* vector) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    reinterpret_cast<float4*>(vector)[(half << shape.log_lanes) + shape.lane()] =
        float4{x[half * 4], x[half * 4 + 1], x[half * 4 + 2], x[half * 4 + 3]};
  }
}

// Adds up Count values over the lanes of a group; a lane gets the sum of value lane() % Count. Each
// step halves the values that a lane still carries, so this takes about as many shuffles as there
// are values, where sums for all lanes would take log2(lanes) times as many.
template <int Count>
VTP_DEVICE float group_sums(float (&x)[Count], RowShape shape) {
  static_assert(Count <= 8, "a group may have 8 lanes");
#pragma unroll
  for (int half = Count / 2; half > 0; half /= 2) {
    const bool upper = (lane_id() & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float mine = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
      x[i] = mine + __shfl_xor_sync(kAllLanes, other, half);
    }
  }
  float sum = x[0];
#pragma unroll
  for (int offset = Count; offset < kWarp; offset *= 2) {
    if (offset < shape.lanes()) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  return sum;
}

// The products of Rows rows with one vector, added up over the group: lane() % Rows says which.
template <int Rows>
VTP_DEVICE float dot_rows(const float (&rows)[Rows][kLaneElements],
                          const float (&vector)[kLaneElements], RowShape shape) {
  float sums[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    sums[r] = rows[r][0] * vector[0];
#pragma unroll
    for (int i = 1; i < kLaneElements; ++i) sums[r] = fmaf(rows[r][i], vector[i], sums[r]);
  }
  return group_sums(sums, shape);
}

template <int Rows>
VTP_DEVICE float square_rows(const float (&rows)[Rows][kLaneElements], RowShape shape) {
  float sums[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    sums[r] = rows[r][0] * rows[r][0];
#pragma unroll
    for (int i = 1; i < kLaneElements; ++i) sums[r] = fmaf(rows[r][i], rows[r][i], sums[r]);
  }
  return group_sums(sums, shape);
}

// sum += weights[r] * row r
template <int Rows>
VTP_DEVICE void add_rows(const float (&rows)[Rows][kLaneElements], const float* weights,
                         float (&sum)[kLaneElements]) {
  static_assert(Rows % 4 == 0);
#pragma unroll
  for (int r = 0; r < Rows; r += 4) {
    const float4 four = *reinterpret_cast<const float4*>(weights + r);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      sum[i] = fmaf(rows[r][i], four.x, sum[i]);
      sum[i] = fmaf(rows[r + 1][i], four.y, sum[i]);
      sum[i] = fmaf(rows[r + 2][i], four.z, sum[i]);
      sum[i] = fmaf(rows[r + 3][i], four.w, sum[i]);
    }
  }
}

// Adds up what a warp's groups hold; every group gets the result.
VTP_DEVICE void sum_groups(float (&x)[kLaneElements], RowShape shape) {
#pragma unroll
  for (int offset = 8; offset < kWarp; offset *= 2) {
    if (offset >= shape.lanes()) {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], offset);
    }
  }
}

}  // namespace vtp::cuda
