// The target of largest cosine for every candidate row: the products of all rows with the gathered
// target rows, a tile at a time, of which only the best so far of every row is kept. The matrix of
// scores is never written.
//
// A row's own norm is the same for all targets and does not change which of them is the best: only
// the products are scaled, by the inverse norms of the targets. A first kernel takes these, and
// finds the rows that are not finite.
//
// Whatever the tile, a product is one sum along the channels, in the same order: a row has the same
// target alone and in a batch.
//
// What must be moved: keys once (B N D s bytes) and 8 B N bytes of positions; what the first kernel
// leaves, 4 B T + B N bytes, is small beside it. Keys of up to an L2 (50 MB on an H200) come from
// DRAM once, in the first kernel; the second reads them from L2, every block its rows once for each
// tile of targets, and the targets. At LLaVA-1.5 (N = 576, D = 1024, T = 30) that is 1.2 MB, 0.3 us:
// two launches and one latency of some 2.5 us each are what it should take. With many targets the
// limit is the tensor core: 2 N T D operations, 66 us at N = 10000, T = 1000, D = 3584 and what
// mma.sync reaches on an H200, if L2 keeps up: tiles of 128 x 128 ask it for a byte every 32
// operations. Expected, not measured.
#include <climits>
#include <cstring>
#include <type_traits>

#include "cuda_ops.h"
#include "vtp/async_copy.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/mma.cuh"
#include "vtp/warp.cuh"

namespace vtp::cuda {
namespace {

// --- norms ------------------------------------------------------------------------------------

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarp;

// What the first kernel tells the second.
struct Norms {
  float* inverse;   // [B, T], of the targets: 0 for a row of zeros, NaN where there is no target
  uint8_t* finite;  // [B, N]: whether the sum of a row's squares is
};

VTP_DEVICE bool is_row(int64_t row, int64_t length) { return row >= 0 && row < length; }

// The sum of a row's squares, the same for all lanes.
template <class T>
VTP_DEVICE float warp_square(const T* row, int dim, bool aligned) {
  constexpr int kSize = kVectorSize<T>, kAtOnce = 4;
  float square = 0.0f;
  if (aligned) {
    for (int first = kSize * lane_id(); first < dim; first += kAtOnce * kSize * kWarp) {
      int4 bits[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * kSize * kWarp;
        bits[i] = int4{0, 0, 0, 0};
        if (at < dim) bits[i] = *reinterpret_cast<const int4*>(row + at);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Vector<T> x;
        memcpy(&x, &bits[i], sizeof x);
#pragma unroll
        for (int j = 0; j < kSize; ++j) square = fmaf(to_float(x.x[j]), to_float(x.x[j]), square);
      }
    }
  } else {
    for (int i = lane_id(); i < dim; i += kWarp) {
      square = fmaf(to_float(row[i]), to_float(row[i]), square);
    }
  }
  return warp_sum(square);
}

// A warp takes a row or, behind all rows, a target.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    key_norms(AssignRows a, Norms norms, unsigned parts, bool aligned) {
  release_next_kernel();
  const auto keys = view_as<const T>(a.keys);
  const int64_t b = blockIdx.x / parts, length = keys.size[1], targets = a.targets.size[1];
  const int64_t unit = static_cast<int64_t>(blockIdx.x % parts) * kNormWarps + warp_id();
  if (unit >= length + targets) return;
  const bool is_target = unit >= length;
  const int64_t row = is_target ? *a.targets.at(b, unit - length) : unit;
  const bool exists = is_row(row, length);
  const int dim = exists ? static_cast<int>(keys.size[2]) : 0;
  const float square = warp_square(keys.at(b, exists ? row : 0), dim, aligned);
  if (lane_id() != 0) return;
  const bool finite = square <= 3.402823466e38f;
  if (is_target) {
    const float inverse = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
    norms.inverse[b * targets + unit - length] =
        exists && finite ? inverse : __int_as_float(0x7fffffff);
  } else {
    norms.finite[b * length + unit] = finite;
  }
}

// --- products ---------------------------------------------------------------------------------

// Side x Side warps, of 32 rows and 32 targets each.
constexpr int kSmallSide = 2, kLargeSide = 4;
constexpr int kChunkUnits = 4;  // of 16 bytes: what is staged of a row at a time
constexpr int kSharedBytes = 48 << 10;

template <int Side>
struct Tile {
  static constexpr int kRows = 32 * Side;  // and as many targets
  static constexpr int kThreads = kWarp * Side * Side;
  static constexpr int kStageUnits = 2 * kRows * kChunkUnits;
  static constexpr int kStages = kSharedBytes / (16 * kStageUnits);
  static constexpr int kCopies = kRows * kChunkUnits / kThreads;  // of a thread, of either side
};

// Where unit q of row r of a stage lies: neighbouring rows, and every other one, in other banks.
VTP_DEVICE int unit_at(int r, int q) { return r * kChunkUnits + (q ^ (r / 2 % kChunkUnits)); }

// Brings rows and targets into shared memory, chunk by chunk and tile of targets by tile.
template <class T, int Side>
class Feed {
 public:
  using Shape = Tile<Side>;

  VTP_DEVICE Feed(const AssignRows& a, int64_t b, int64_t first, int4* stages, bool aligned)
      : a_(a), keys_(view_as<const T>(a.keys)), b_(b), stages_(stages), aligned_(aligned) {
    dim_ = static_cast<int>(keys_.size[2]);
    chunks_ = dim_ > 0 ? static_cast<int>(divide_up(dim_, kChunkUnits * kVectorSize<T>)) : 1;
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) row_[i] = row_of(first + tile_row(i));
  }

  VTP_DEVICE int chunks() const { return chunks_; }

  // The next chunk goes to a stage, unless the last one has gone.
  VTP_DEVICE void copy(int stage) {
    const int64_t targets = a_.targets.size[1];
    if (static_cast<int64_t>(tile_) * Shape::kRows < targets) {
      int4* rows = stages_ + stage * Shape::kStageUnits;
#pragma unroll
      for (int i = 0; i < Shape::kCopies; ++i) {
        if (chunk_ == 0) {
          const int64_t t = static_cast<int64_t>(tile_) * Shape::kRows + tile_row(i);
          target_[i] = row_of(t < targets ? *a_.targets.at(b_, t) : -1);
        }
        const int r = tile_row(i), q = static_cast<int>(threadIdx.x) % kChunkUnits;
        copy_unit(rows + unit_at(r, q), row_[i], chunk_ * kChunkUnits + q);
        copy_unit(rows + Shape::kRows * kChunkUnits + unit_at(r, q), target_[i],
                  chunk_ * kChunkUnits + q);
      }
      if (++chunk_ == chunks_) chunk_ = 0, ++tile_;
    }
    commit_copies();
  }

 private:
  static VTP_DEVICE int tile_row(int i) {
    return (static_cast<int>(threadIdx.x) + i * Shape::kThreads) / kChunkUnits;
  }

  VTP_DEVICE const T* row_of(int64_t row) const {
    return is_row(row, keys_.size[1]) ? keys_.at(b_, row) : nullptr;
  }

  VTP_DEVICE void copy_unit(int4* out, const T* row, int unit) const {
    const int first = unit * kVectorSize<T>;
    const bool inside = row != nullptr && first < dim_;
    if (aligned_) {
      if (inside) {
        copy_async(out, row + first, true);
      } else {
        *out = int4{0, 0, 0, 0};
      }
      return;
    }
    Vector<T> x;
#pragma unroll
    for (int j = 0; j < kVectorSize<T>; ++j) {
      x.x[j] = inside && first + j < dim_ ? row[first + j] : from_float<T>(0.0f);
    }
    memcpy(out, &x, sizeof x);
  }

  const AssignRows& a_;
  const View<const T, 3> keys_;
  const int64_t b_;
  int4* const stages_;
  const bool aligned_;
  int dim_, chunks_;
  int chunk_ = 0, tile_ = 0;
  const T *row_[Shape::kCopies], *target_[Shape::kCopies];
};

// A warp's 32 x 32 products, spread as mma() leaves them: with g = lane / 4 and t = lane % 4, a lane
// has those of rows 8 i + g and targets 8 n + 2 t + j. Which word of a unit is multiplied when does
// not matter, as long as rows and targets agree: units serve as operands as they are (key_tile.cuh).
// Before sm_80 tensor cores do not know bfloat16.
template <class T>
struct Products {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kTensorCore = std::is_same_v<T, __half>;
#else
  static constexpr bool kTensorCore = sizeof(T) == 2;
#endif

  float sum[2][4][4];

  VTP_DEVICE float at(int i, int n, int j) const { return sum[i / 2][n][i % 2 * 2 + j]; }

  VTP_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) sum[m][n][x] = 0.0f;
      }
    }
  }

  // Adds those of a chunk of the warp's rows and targets.
  VTP_DEVICE void add(const int4* rows, int first_row, const int4* targets, int first_target) {
    if constexpr (kTensorCore) {
      add_by_tensor_core(rows, first_row, targets, first_target);
    } else {
      add_by_lanes(rows, first_row, targets, first_target);
    }
  }

 private:
  static VTP_DEVICE uint32_t word(int bits) { return static_cast<uint32_t>(bits); }

  static VTP_DEVICE Vector<T> vector_of(const int4& bits) {
    Vector<T> x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }

  VTP_DEVICE void add_by_tensor_core(const int4* rows, int first_row, const int4* targets,
                                     int first_target) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    int4 row[4], target[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row[i] = rows[unit_at(first_row + 8 * i + g, t)];
      target[i] = targets[unit_at(first_target + 8 * i + g, t)];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int4 low = row[2 * m], high = row[2 * m + 1];
      const uint32_t first[4] = {word(low.x), word(high.x), word(low.y), word(high.y)};
      const uint32_t second[4] = {word(low.z), word(high.z), word(low.w), word(high.w)};
#pragma unroll
      for (int n = 0; n < 4; ++n) mma<T>(sum[m][n], first, {word(target[n].x), word(target[n].y)});
#pragma unroll
      for (int n = 0; n < 4; ++n) mma<T>(sum[m][n], second, {word(target[n].z), word(target[n].w)});
    }
  }

  VTP_DEVICE void add_by_lanes(const int4* rows, int first_row, const int4* targets,
                               int first_target) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int q = 0; q < kChunkUnits; ++q) {
      Vector<T> row[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = vector_of(rows[unit_at(first_row + 8 * i + g, q)]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto target =
              vector_of(targets[unit_at(first_target + 8 * n + 2 * t + j, q)]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = sum[i / 2][n][i % 2 * 2 + j];
#pragma unroll
            for (int e = 0; e < kVectorSize<T>; ++e) {
              x = fmaf(to_float(row[i].x[e]), to_float(target.x[e]), x);
            }
          }
        }
      }
    }
  }
};

// --- the best of every row --------------------------------------------------------------------

struct Best {
  float cosine;
  int position;

  VTP_DEVICE void take(float other_cosine, int other_position) {
    const bool is_better =
        other_cosine > cosine || (other_cosine == cosine && other_position < position);
    cosine = is_better ? other_cosine : cosine;
    position = is_better ? other_position : position;
  }
};

VTP_DEVICE Best nobody() { return {-__int_as_float(0x7f800000), INT_MAX}; }

template <int Side>
struct TileResult {
  Best best[Side][Tile<Side>::kRows];  // by column of warps
  int own[Tile<Side>::kRows];          // the position of a row that is a target, else -1
};

// Which rows of the tile are targets themselves.
template <int Side>
VTP_DEVICE void find_own(const AssignRows& a, int64_t b, int64_t first, int (&own)[32 * Side]) {
  for (int i = threadIdx.x; i < Tile<Side>::kRows; i += Tile<Side>::kThreads) own[i] = -1;
  __syncthreads();
  for (int64_t t = threadIdx.x; t < a.targets.size[1]; t += Tile<Side>::kThreads) {
    const int64_t at = *a.targets.at(b, t) - first;
    if (at >= 0 && at < Tile<Side>::kRows) own[at] = static_cast<int>(t);
  }
}

// Of the products of a tile of targets. What is no target has NaN, which is larger than nothing.
template <class T>
VTP_DEVICE void take_best(const Products<T>& products, const float* inverse, int64_t first_target,
                          int64_t targets, Best (&best)[4]) {
  float factor[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t t = first_target + 8 * n + lane_id() % 4 * 2 + j;
      factor[n][j] = t < targets ? inverse[t] : __int_as_float(0x7fffffff);
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = static_cast<int>(first_target) + 8 * n + lane_id() % 4 * 2 + j;
#pragma unroll
      for (int i = 0; i < 4; ++i) best[i].take(products.at(i, n, j) * factor[n][j], t);
    }
  }
}

template <int Side>
VTP_DEVICE void write_tile(const AssignRows& a, const Norms& norms, int64_t b, int64_t first,
                           const TileResult<Side>& result) {
  const int r = threadIdx.x;
  const int64_t length = a.keys.size[1], row = first + r;
  if (r >= Tile<Side>::kRows || row >= length) return;
  Best best = nobody();
#pragma unroll
  for (int column = 0; column < Side; ++column) {
    best.take(result.best[column][r].cosine, result.best[column][r].position);
  }
  const bool is_candidate = !a.candidates || *a.candidates.at(b, row);
  const bool is_assigned =
      is_candidate && norms.finite[b * length + row] && best.position != INT_MAX;
  const int own = result.own[r];
  a.assignment[b * length + row] = own >= 0 ? own : is_assigned ? best.position : -1;
}

template <class T, int Side>
__global__ void __launch_bounds__(Tile<Side>::kThreads)
    nearest_targets(AssignRows a, Norms norms, unsigned tiles, bool aligned) {
  using Shape = Tile<Side>;
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(TileResult<Side>, result);
  int4* const stages = reinterpret_cast<int4*>(shared);
  const int64_t b = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles) * Shape::kRows;
  const int row = warp_id() / Side * 32, target = warp_id() % Side * 32;
  const int64_t targets = a.targets.size[1];

  Feed<T, Side> feed(a, b, first, stages, aligned);
#pragma unroll
  for (int stage = 0; stage + 1 < Shape::kStages; ++stage) feed.copy(stage);
  find_own<Side>(a, b, first, result.own);
  await_earlier_kernels();

  Best best[4] = {nobody(), nobody(), nobody(), nobody()};
  Products<T> products;
  int stage = 0;
  for (int64_t tile = 0; tile < targets; tile += Shape::kRows) {
    products.clear();
    for (int chunk = 0; chunk < feed.chunks(); ++chunk) {
      wait_copies<Shape::kStages - 2>();
      __syncthreads();
      feed.copy(stage == 0 ? Shape::kStages - 1 : stage - 1);  // that of the chunk before
      const int4* rows = stages + stage * Shape::kStageUnits;
      products.add(rows, row, rows + Shape::kRows * kChunkUnits, target);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    take_best(products, norms.inverse + b * targets, tile + target, targets, best);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      best[i].take(__shfl_xor_sync(kAllLanes, best[i].cosine, distance),
                   __shfl_xor_sync(kAllLanes, best[i].position, distance));
    }
    if (lane_id() % 4 == 0) result.best[warp_id() % Side][row + 8 * i + lane_id() / 4] = best[i];
  }
  __syncthreads();
  write_tile<Side>(a, norms, b, first, result);
}

// --- launches ---------------------------------------------------------------------------------

Norms take_norms(const AssignRows& a, Pieces& pieces) {
  Norms norms;
  norms.inverse = pieces.take<float>(a.keys.size[0] * a.targets.size[1]);
  norms.finite = pieces.take<uint8_t>(a.keys.size[0] * a.keys.size[1]);
  return norms;
}

template <class T, int Side>
void launch_nearest(const char* name, const AssignRows& a, const Norms& norms, bool aligned,
                    OpStream& stream) {
  const int64_t tiles = divide_up(a.keys.size[1], Tile<Side>::kRows);
  launch(name, nearest_targets<T, Side>, dim3(a.keys.size[0] * tiles), Tile<Side>::kThreads,
         kSharedBytes, stream, a, norms, tiles, aligned);
}

// Large tiles ask less of L2, and fill a device only with many rows.
bool large_tiles_pay(const AssignRows& a) {
  constexpr int64_t kEnough = 100;  // of 132 multiprocessors
  return a.targets.size[1] > 32 * kSmallSide &&
         a.keys.size[0] * divide_up(a.keys.size[1], 32 * kLargeSide) >= kEnough;
}

}  // namespace

size_t assign_rows_workspace(const AssignRows& a) {
  Pieces pieces(nullptr);
  take_norms(a, pieces);
  return pieces.bytes();
}

void assign_rows(const AssignRows& a, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const Norms norms = take_norms(a, pieces);
  const int64_t parts = divide_up(a.keys.size[1] + a.targets.size[1], kNormWarps);
  const bool aligned = rows_are_aligned(a.keys);
  if (a.keys.size[1] == 0) return;
  OpStream ours(stream);
  with_type(a.keys.dtype, [&](auto type) {
    using T = decltype(type);
    launch("assign_rows norms", key_norms<T>, dim3(a.keys.size[0] * parts), kNormThreads, 0, ours,
           a, norms, parts, aligned);
    if constexpr (sizeof(T) == 2) {  // products of float32 are bound by their arithmetic
      if (large_tiles_pay(a)) {
        return launch_nearest<T, kLargeSide>("assign_rows: large tiles", a, norms, aligned, ours);
      }
    }
    launch_nearest<T, kSmallSide>("assign_rows", a, norms, aligned, ours);
  });
}

}  // namespace vtp::cuda
