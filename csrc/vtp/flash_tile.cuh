// Tiles of attention as FlashAttention-2 lays them out: a warp owns 16 query rows and runs through
// tiles of keys with an online softmax, logits and sums in registers, rows of 16-byte chunks in
// shared memory. Keys are gathered by position, so that a tile holds just the keys it is about.
//
// Logits lie like the accumulator of mma.cuh: with g = lane / 4 and t = lane % 4, a lane holds rows
// g (entries 0, 1) and g + 8 (entries 2, 3) of keys 8 j + 2 t and 8 j + 2 t + 1 in logits[j].
#pragma once

#include <climits>
#include <type_traits>

#include "async_copy.cuh"
#include "math.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace vtp::cuda {

constexpr int kWarpRows = 16;

// Whether products of T run on tensor cores. They round float32; sm_75 lacks bfloat16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kTensorCores = std::is_same_v<T, __half>;
#else
template <class T>
constexpr bool kTensorCores = !std::is_same_v<T, float>;
#endif

// Rows of Columns elements in shared memory. Chunks of a row are permuted, else those of one column
// would all lie in the same banks. Every eighth row is permuted alike: chunk(row + 8 * n, c) lies
// 8 * n * Columns elements behind chunk(row, c), a constant where n is one.
template <class T, int Columns>
struct SharedRows {
  static constexpr int kChunks = Columns / kVectorSize<T>;
  static_assert(kChunks % 8 == 0, "the permutation is one of 8 chunks");

  T* base;

  VTP_DEVICE T* chunk(int row, int chunk) const {
    return base + row * Columns + (chunk ^ (row % 8)) * kVectorSize<T>;
  }
  VTP_DEVICE T* at(int row, int column) const {
    return chunk(row, column / kVectorSize<T>) + column % kVectorSize<T>;
  }
};

// How many chunks of a row are read: its `dim` elements, rounded up to four chunks, the step in
// which sums of values go over columns. What lies behind `dim` is filled with zeros.
template <class T>
VTP_DEVICE int chunks_read(int dim) {
  constexpr int kStep = 4 * kVectorSize<T>;
  return (dim + kStep - 1) / kStep * 4;
}

// Rows of a strided array, named by position, of which there are `count`.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int dim;
  bool aligned;  // every row to 16 bytes
  const int* positions;
  int count;
};

template <class T>
VTP_DEVICE void copy_elements(T* target, const T* source, int count) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    vector.x[i] = i < count ? source[i] : from_float<T>(0.0f);
  }
  int4 bits;
  memcpy(&bits, &vector, sizeof bits);
  *reinterpret_cast<int4*>(target) = bits;
}

// Requests a tile of TileRows rows from row `first` on, zeros where there are no more; all Threads
// of a block call it. The rows are there after wait_copies and a barrier.
template <int TileRows, int Threads, class T, int Columns>
VTP_DEVICE void gather_rows(const SharedRows<T, Columns>& tile, const Rows<T>& rows, int first) {
  constexpr int kChunks = SharedRows<T, Columns>::kChunks, kStep = Threads / kChunks;
  static_assert(Threads % kChunks == 0 && TileRows % kStep == 0);
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks;
  if (chunk >= chunks_read<T>(rows.dim)) return;
  const int elements = rows.dim - chunk * kVectorSize<T>;
  const int row = thread / kChunks;
  const auto source = [&](int i, bool real) {
    const T* data = rows.data;
    if (real) data += rows.positions[first + row + i] * rows.stride + chunk * kVectorSize<T>;
    return data;
  };
  if (rows.aligned) {
#pragma unroll 4
    for (int i = 0; i < TileRows; i += kStep) {
      const bool real = first + row + i < rows.count && elements > 0;
      copy_async(tile.chunk(row + i, chunk), source(i, real), real);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < TileRows; i += kStep) {
      const bool real = first + row + i < rows.count && elements > 0;
      copy_elements(tile.chunk(row + i, chunk), source(i, real), real ? elements : 0);
    }
  }
}

// --- logits ---------------------------------------------------------------------------------------

// logits = query key^T, for the 16 rows of `query` from `row` on.
template <int Keys, class T, int Columns>
VTP_DEVICE void multiply_keys(float (&logits)[Keys / 8][4], const SharedRows<T, Columns>& query,
                              int row, const SharedRows<T, Columns>& key, int dim) {
  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[j][i] = 0.0f;
  }
  if constexpr (kTensorCores<T>) {
    const int steps = (dim + 15) / 16;
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      uint32_t a[4];
      load_matrices(a, query.chunk(row + lane % 16, 2 * k + lane / 16));
      const T* key_row = key.chunk(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
#pragma unroll
      for (int j = 0; j < Keys / 8; j += 2) {
        uint32_t b[4];
        load_matrices(b, key_row + 8 * j * Columns);
        mma<T>(logits[j], a, {b[0], b[1]});
        mma<T>(logits[j + 1], a, {b[2], b[3]});
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4, chunks = chunks_read<T>(dim);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float q[2][kVectorSize<T>];
      load_vector(query.chunk(row + g, chunk), q[0]);
      load_vector(query.chunk(row + g + 8, chunk), q[1]);
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float k[kVectorSize<T>];
          load_vector(key.chunk(8 * j + 2 * t + i, chunk), k);
#pragma unroll
          for (int e = 0; e < kVectorSize<T>; ++e) {
            logits[j][i] = fmaf(q[0][e], k[e], logits[j][i]);
            logits[j][2 + i] = fmaf(q[1][e], k[e], logits[j][2 + i]);
          }
        }
      }
    }
  }
}

// --- softmax --------------------------------------------------------------------------------------

// Online softmax of the lane's two rows. Its four neighbours hold the other keys of the same rows:
// they share the maximum, each keeps sums of its own until total().
struct RowMaximum {
  float value[2] = {-INFINITY, -INFINITY};

  // Turns a tile of logits in base 2 into weights relative to the new maximum. Sums relative to the
  // old one must be multiplied by `keep`; `sum` is that of the tile.
  template <int Keys>
  VTP_DEVICE void weigh(float (&logits)[Keys][4], float (&keep)[2], float (&sum)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = value[h];
#pragma unroll
      for (int j = 0; j < Keys; ++j) {
        top = fmaxf(top, fmaxf(logits[j][2 * h], logits[j][2 * h + 1]));
      }
      top = warp_max<4>(top);
      const float base = top == -INFINITY ? 0.0f : top;  // -inf - -inf is NaN
      keep[h] = fast_exp2(value[h] - base);
      value[h] = top;
      sum[h] = 0.0f;
#pragma unroll
      for (int j = 0; j < Keys; ++j) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          logits[j][i] = fast_exp2(logits[j][i] - base);
          sum[h] += logits[j][i];
        }
      }
    }
  }

  VTP_DEVICE static float total(float sum) { return warp_sum<4>(sum); }
};

// --- values ---------------------------------------------------------------------------------------

// The output column that a lane's sums[j][i] belongs to (rows are g for i < 2 and g + 8 for others).
template <class T>
VTP_DEVICE int column_of(int j, int i) {
  const int t = lane_id() % 4, element = 2 * j + i % 2;
  if constexpr (kTensorCores<T>) return 8 * j + 2 * t + i % 2;
  return (element / kVectorSize<T> * 4 + t) * kVectorSize<T> + element % kVectorSize<T>;
}

// The operand of 16 weights a row. One 16-bit float would round them to 2^-9 or 2^-12, which sums
// would show even after they are rounded to T themselves; two add up to float32 near enough.
template <class T>
struct SplitWeights {
  uint32_t high[4], low[4];

  VTP_DEVICE SplitWeights(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = i < 2 ? left[2 * i] : right[2 * i - 4];
      const float y = i < 2 ? left[2 * i + 1] : right[2 * i - 3];
      high[i] = pack<T>(x, y);
      const Pair<T> rounded = unpack<T>(high[i]);
      low[i] = pack<T>(x - to_float(rounded.x[0]), y - to_float(rounded.x[1]));
    }
  }
};

// sums += weights value; columns as column_of says.
template <int Keys, class T, int Columns>
VTP_DEVICE void add_values(float (&sums)[Columns / 8][4], const float (&weights)[Keys / 8][4],
                           const SharedRows<T, Columns>& value, int dim) {
  constexpr int kChunks = SharedRows<T, Columns>::kChunks;
  const int lane = lane_id(), chunks = chunks_read<T>(dim);
  if constexpr (kTensorCores<T>) {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) {
      const SplitWeights<T> split(weights[2 * k], weights[2 * k + 1]);
#pragma unroll
      for (int c = 0; c < kChunks; c += 4) {
        if (c >= chunks) continue;
#pragma unroll
        for (int j = c; j < c + 4; j += 2) {
          uint32_t b[4];
          load_matrices<true>(b, value.chunk(lane % 16, j + lane / 16) + 16 * k * Columns);
          mma<T>(sums[j], split.high, {b[0], b[1]});
          mma<T>(sums[j + 1], split.high, {b[2], b[3]});
          mma<T>(sums[j], split.low, {b[0], b[1]});
          mma<T>(sums[j + 1], split.low, {b[2], b[3]});
        }
      }
    }
  } else {
    const int t = lane % 4;
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll 1
      for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float upper = __shfl_sync(kAllLanes, weights[j][i], lane - t + owner);
          const float lower = __shfl_sync(kAllLanes, weights[j][2 + i], lane - t + owner);
#pragma unroll
          for (int c = 0; c < kChunks; c += 4) {
            if (c >= chunks) continue;
            float v[kVectorSize<T>];
            load_vector(value.chunk(8 * j + 2 * owner + i, c + t), v);
#pragma unroll
            for (int e = 0; e < kVectorSize<T>; ++e) {
              float(&sum)[4] = sums[(c / 4 * kVectorSize<T> + e) / 2];
              sum[e % 2] = fmaf(upper, v[e], sum[e % 2]);
              sum[2 + e % 2] = fmaf(lower, v[e], sum[2 + e % 2]);
            }
          }
        }
      }
    }
  }
}

}  // namespace vtp::cuda
