// Greedy choice of rows that differ, in three launches: products of all pairs of rows, cosines of
// them, and one kernel that takes all k steps, each of which depends on the one before.
//
// A step is a reduction over the columns and one row of cosines from L2, of which a thread reads its
// own columns. It costs latencies, and nothing is won by more threads than there are columns:
//   maxmin  one block a row, nearest distances in registers, one barrier a step. Two warp reductions
//           with a barrier between them about 150 cycles, a row from L2 300, the rest 50: 0.3 us, so
//           18 us at 576 rows and k = 64, 90 us at 2880 and 320.
//   dpp     step t adds the products of t numbers for each column, k^2 N / 2 in all. A cluster shares
//           the columns where there is one: an eighth of the sums each, and shared memory for most
//           of the factor, for a cluster barrier a step. 900 cycles and 6 more a t: 0.5 to 0.7 us,
//           40 us at 576 and 64. Elsewhere a single block takes eight times the sums, 1 us a step.
// The products before it are N^2 C / 2: at C = 4096 some 10 us for 576 rows (45 tiles of 64), 100 us
// for 2880 (276 tiles of 128), of which L2 takes most; the cosines 2 and 10 us.
//
// N^2 floats are 1.3 MB, 33 MB and, at 16384 rows, 1 GiB of workspace a batch entry, which is where
// the matrix ends. Time alone would go on: a step reads N floats of the matrix, but N C numbers where
// cosines are taken on the fly, by the 8 multiprocessors of a cluster at best (10,000 rows of 3584
// bfloat16: 80 us, against 1.5 ms once for the matrix). Rows no longer than a sector, 32 bytes, are
// as soon read as their cosines, and have no matrix either.
//
// All figures by count of instructions, bytes and latencies: nothing is measured.
#include <algorithm>

#include "cuda_ops.h"
#include "vtp/cluster_launch.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/greedy_pick.cuh"
#include "vtp/product_tile.cuh"
#include "vtp/select_row.cuh"

namespace vtp::cuda {
namespace {

// In the workspace; null what a call has no use for.
struct DiverseParts {
  int stride = 0;            // of a row of floats, a multiple of 32
  float* matrix = nullptr;   // [B, N, stride]: products, then distances (maxmin) or cosines (dpp)
  float* squares = nullptr;  // [B, stride], see row_cosine.cuh; NaN past the end
  float* near = nullptr;     // [B, stride]: distance to the nearest kept row, infinity without any
  float* state = nullptr;    // [B, stride]: distance to what is nearest (maxmin), what is left (dpp)
  float* weight = nullptr;   // [B, stride]: relevance, of dpp
  float* factor = nullptr;   // [B, N, factor_stride] of dpp, where shared memory does not hold it
  int factor_stride = 0;     // a multiple of 4
};

VTP_DEVICE bool is_set(const Mask& mask, int64_t batch, int row) { return *mask.at(batch, row); }

// The square of a row, with its part in the choice.
VTP_DEVICE float signed_square(const SelectDiverse& a, int64_t batch, int row, float square) {
  if (a.keep && is_set(a.keep, batch, row)) return -square;
  return !a.candidates || is_set(a.candidates, batch, row) ? square : NAN;
}

// Four neighbouring floats, aligned to sixteen bytes.
struct Fours {
  float x[4];

  VTP_DEVICE void load(const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  }

  VTP_DEVICE void store(float* to) const {
    const float4 four = {x[0], x[1], x[2], x[3]};
    *reinterpret_cast<float4*>(to) = four;
  }
};

// --- products and cosines of all pairs --------------------------------------------------------

struct TilePair {
  int row, column;  // row <= column

  // Number i of the triangle, column by column.
  VTP_DEVICE static TilePair of(int i) {
    int column = static_cast<int>((sqrtf(8.0f * static_cast<float>(i) + 1.0f) - 1.0f) * 0.5f);
    while (column * (column + 1) / 2 > i) --column;
    while ((column + 1) * (column + 2) / 2 <= i) ++column;
    return {i - column * (column + 1) / 2, column};
  }
};

// By the block of a tile on the diagonal: the squares, from their products.
template <class T, int Tile>
VTP_DEVICE void write_squares(const SelectDiverse& a, const DiverseParts& parts, int64_t batch,
                              const FeatureRows<T>& rows, int first,
                              const ProductTile<T, Tile>& tile, float* diagonal) {
  __syncthreads();  // the slices are no longer needed
  tile.for_each_pair([&](int i, int column, float x, float y) {
    const int row = tile.row_of_thread(i);
    if (row == column || row == column + 1) diagonal[row] = row == column ? x : y;
  });
  __syncthreads();
  for (int i = warp_id() * kWarp; i < Tile; i += ProductTile<T, Tile>::kThreads) {
    const int row = first + i + lane_id();
    const float product = diagonal[i + lane_id()];
    float square = row < rows.count ? product : NAN;
    const bool is_safe = product >= kLeastSquare && product <= kMostSquare;
    unsigned others = __ballot_sync(kAllLanes, row < rows.count && !is_safe);
    for (; others != 0; others &= others - 1) {
      const int lane = __ffs(static_cast<int>(others)) - 1;
      const float found = square_of(rows, first + i + lane, NAN);
      if (lane_id() == lane) square = found;
    }
    if (row < rows.count) square = signed_square(a, batch, row, square);
    if (row < parts.stride) parts.squares[batch * parts.stride + row] = square;
  }
}

// Blocks a multiprocessor is to hold; large tiles without tensor cores need the registers of two.
template <class T, int Tile>
constexpr int kProductBlocks = Tile == 128 && !kTensorCores<T> ? 1 : 2;

// Every pair of tiles once; what is left of the diagonal is the mirror image of what is right of it.
template <class T, int Tile>
__global__ void __launch_bounds__(ProductTile<T, Tile>::kThreads, kProductBlocks<T, Tile>)
    products(SelectDiverse a, DiverseParts parts, bool aligned, unsigned pairs) {
  VTP_DYNAMIC_SHARED(shared);
  release_next_kernel();
  const int64_t batch = blockIdx.x / pairs;
  const TilePair pair = TilePair::of(static_cast<int>(blockIdx.x % pairs));
  const int first_row = pair.row * Tile, first_column = pair.column * Tile;
  const auto rows = FeatureRows<T>::of(a, batch, aligned);
  ProductTile<T, Tile> tile;
  tile.multiply(rows, first_row, first_column, shared);
  float* const matrix = parts.matrix + batch * rows.count * parts.stride;
  const int stride = parts.stride;  // a matrix is smaller than 2^31
  tile.for_each_pair([&](int i, int j, float x, float y) {
    const int row = first_row + tile.row_of_thread(i), column = first_column + j;
    const float2 both = {x, y};
    if (row < rows.count && column < stride) {
      *reinterpret_cast<float2*>(matrix + (row * stride + column)) = both;
    }
  });
  if (pair.row == pair.column) {
    write_squares(a, parts, batch, rows, first_row, tile, reinterpret_cast<float*>(shared));
    return;
  }
  // By a loop of its own: with the stores above, addresses would take more registers than there are.
  tile.for_each_pair([&](int i, int j, float x, float y) {
    const int row = first_row + tile.row_of_thread(i), column = first_column + j;
    if (column < rows.count) matrix[column * stride + row] = x;
    if (column + 1 < rows.count) matrix[column * stride + stride + row] = y;
  });
}

// What stands for a distance where there is none. Distances only fall, and not below -1.
constexpr float kChosen = -INFINITY, kAbsent = -0x1.fffffep127f;
constexpr float kOdd = -0x1p127f;  // a candidate that is not finite comes last
constexpr uint32_t kOddKey = 0x00ffffffu;  // sortable(kOdd)

// A row's distances to what it may be nearest to: other candidates, and rows that are kept.
struct Nearest {
  float alone, near;

  VTP_DEVICE static Nearest none() { return {INFINITY, INFINITY}; }

  VTP_DEVICE void consider(float cosine, float square, bool is_other) {
    const float distance = has_part(square) ? 1.0f - cosine : INFINITY;
    if (is_kept(square)) {
      near = fminf(near, distance);
    } else if (is_other) {
      alone = fminf(alone, distance);
    }
  }

  VTP_DEVICE void add(const Nearest& other) {
    alone = fminf(alone, other.alone);
    near = fminf(near, other.near);
  }

  // Over groups of Width lanes.
  template <int Width>
  VTP_DEVICE void reduce() {
    alone = warp_min<Width>(alone);
    near = warp_min<Width>(near);
  }

  // Where the row stands before the first pick. With `first` it begins as if it were alone.
  VTP_DEVICE float start(const SelectDiverse& a, int64_t batch, int row, float square) const {
    if (row >= a.features.size[1]) return kAbsent;
    if (a.keep && is_set(a.keep, batch, row)) return kChosen;
    if (a.candidates && !is_set(a.candidates, batch, row)) return kAbsent;
    if (!has_part(square)) return kOdd;
    return near < INFINITY ? near : row == a.first ? INFINITY : alone;
  }

  VTP_DEVICE void write(const SelectDiverse& a, const DiverseParts& parts, int64_t batch, int row,
                        float square) const {
    const int64_t at = batch * parts.stride + row;
    parts.state[at] = start(a, batch, row, square);
    if (parts.near) parts.near[at] = near;
  }
};

// By a whole warp: considers those rows whose cosine with `row` float32 products do not give;
// f(other, cosine), by one lane, says which they are.
template <class T, class F>
VTP_DEVICE void consider_lost(const FeatureRows<T>& rows, const float* squares, int row,
                              Nearest& nearest, const F& f) {
  const float own = squares[row];
#pragma unroll 1
  for (int base = 0; base < rows.count; base += kWarp) {
    const int other = base + lane_id();
    const float square = other < rows.count ? squares[other] : NAN;
    for_lost(rows, row, other, is_lost(own, square), [&](int lane, float cosine) {
      if (lane_id() != lane) return;
      nearest.consider(cosine, square, other != row);
      f(other, cosine);
    });
  }
}

constexpr int kCosineThreads = 256;

// Turns a row of products into cosines or distances, a warp a row. Those without a part stay as they
// are: nobody will ask for them. What is nearest is written past the end, too.
template <class T>
__global__ void __launch_bounds__(kCosineThreads, 2)
    cosines(SelectDiverse a, DiverseParts parts, bool aligned, unsigned blocks) {
  const int64_t batch = blockIdx.x / blocks;
  const int row = static_cast<int>(blockIdx.x % blocks) * (kCosineThreads / kWarp) + warp_id();
  const auto rows = FeatureRows<T>::of(a, batch, aligned);
  release_next_kernel();
  await_earlier_kernels();
  if (row >= parts.stride) return;
  const bool is_maxmin = a.rule == Diversity::maxmin;
  const float* squares = parts.squares + batch * parts.stride;
  const float own = squares[row];
  if (!has_part(own)) {
    if (is_maxmin && lane_id() == 0) Nearest::none().write(a, parts, batch, row, own);
    return;
  }
  float* values = parts.matrix + (batch * rows.count + row) * parts.stride;
  const auto value_of = [&](float cosine) {
    return is_maxmin ? 1.0f - cosine : cosine;
  };
  Nearest nearest = Nearest::none();
  bool any_lost = false;
#pragma unroll 2
  for (int base = 0; base < parts.stride; base += 4 * kWarp) {
    const int first = base + 4 * lane_id();
    if (first >= parts.stride) continue;
    Fours value, square;
    value.load(values + first);
    square.load(squares + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool lost = is_lost(own, square.x[i]);
      const float cosine = plain_cosine(value.x[i], own, square.x[i]);
      nearest.consider(cosine, lost ? NAN : square.x[i], first + i != row);
      any_lost = any_lost || lost;
      value.x[i] = value_of(cosine);
    }
    value.store(values + first);
  }
  if (__any_sync(kAllLanes, any_lost)) {
    __syncwarp();  // which other lanes have written
    consider_lost(rows, squares, row, nearest,
                  [&](int other, float cosine) { values[other] = value_of(cosine); });
  }
  if (!is_maxmin) return;
  nearest.reduce<kWarp>();
  if (lane_id() == 0) nearest.write(a, parts, batch, row, own);
}

// --- the same where there is no matrix --------------------------------------------------------

// The squares alone, a warp a row.
template <class T>
__global__ void __launch_bounds__(kCosineThreads, 2)
    row_squares(SelectDiverse a, DiverseParts parts, bool aligned, unsigned blocks) {
  const int64_t batch = blockIdx.x / blocks;
  const int row = static_cast<int>(blockIdx.x % blocks) * (kCosineThreads / kWarp) + warp_id();
  const auto rows = FeatureRows<T>::of(a, batch, aligned);
  release_next_kernel();
  if (row >= rows.count) return;
  float product[1];
  row_products(rows, row, {row}, product);
  const float square = square_of(rows, row, product[0]);
  if (lane_id() == 0) {
    parts.squares[batch * parts.stride + row] = signed_square(a, batch, row, square);
  }
}

constexpr int kNearestTile = 64;

// Of a row in the right half of the columns, and in all.
struct NearestScratch {
  Nearest right[kNearestTile], all[kNearestTile];
};

// Distances of all pairs, of which a row's smallest are kept: a block has 64 rows.
template <class T>
__global__ void __launch_bounds__(ProductTile<T, kNearestTile>::kThreads, 2)
    nearest_rows(SelectDiverse a, DiverseParts parts, bool aligned, unsigned blocks) {
  using Tile = ProductTile<T, kNearestTile>;
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(NearestScratch, scratch);
  const int64_t batch = blockIdx.x / blocks;
  const int first_row = static_cast<int>(blockIdx.x % blocks) * kNearestTile;
  const auto rows = FeatureRows<T>::of(a, batch, aligned);
  release_next_kernel();
  await_earlier_kernels();
  const float* squares = parts.squares + batch * parts.stride;
  const auto square_at = [&](int row) { return row < rows.count ? squares[row] : NAN; };
  Nearest nearest[Tile::kRowsOfThread];
#pragma unroll
  for (int i = 0; i < Tile::kRowsOfThread; ++i) nearest[i] = Nearest::none();
  bool any_lost = false;
#pragma unroll 1
  for (int first = 0; first < rows.count; first += kNearestTile) {
    Tile tile;
    tile.multiply(rows, first_row, first, shared);
    tile.for_each_pair([&](int i, int j, float x, float y) {
      const int row = first_row + tile.row_of_thread(i), column = first + j;
      const float own = square_at(row);
      const auto consider = [&](int other, float product) {
        const float square = square_at(other);
        const bool lost = is_lost(own, square);
        const float cosine = plain_cosine(product, own, square);
        nearest[i].consider(cosine, lost ? NAN : square, row != other);
        any_lost = any_lost || lost;
      };
      consider(column, x);
      consider(column + 1, y);
    });
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Tile::kRowsOfThread; ++i) {
    nearest[i].template reduce<4>();
    if (Tile::is_right() && lane_id() % 4 == 0) {
      scratch.right[Tile::row_of_thread(i)] = nearest[i];
    }
  }
  any_lost = __syncthreads_or(any_lost);
#pragma unroll
  for (int i = 0; i < Tile::kRowsOfThread; ++i) {
    const int place = Tile::row_of_thread(i);
    if (Tile::is_right() || lane_id() % 4 != 0) continue;
    nearest[i].add(scratch.right[place]);
    scratch.all[place] = nearest[i];
  }
  __syncthreads();
#pragma unroll 1
  for (int place = warp_id(); place < kNearestTile; place += Tile::kWarps) {
    const int row = first_row + place;
    if (row >= rows.count) break;
    Nearest found = scratch.all[place];
    if (any_lost) consider_lost(rows, squares, row, found, [](int, float) {});
    found.reduce<kWarp>();
    if (lane_id() == 0) found.write(a, parts, batch, row, squares[row]);
  }
}

// --- max-min ----------------------------------------------------------------------------------

VTP_DEVICE Pick pick_of(float distance, int column) {
  return {distance > kAbsent ? sortable(distance) : 0, column};
}

// How many rows are to be taken; by a whole block.
VTP_DEVICE int picks_of(const SelectDiverse& a, int64_t batch, BlockScratch<int>& scratch) {
  const RawInteger raw =
      a.k_per_row ? RawInteger::load(a.k_per_row, batch) : RawInteger::of(a.k);
  int kept = 0;
  if (a.keep) {
    const auto is_kept = [&](int row) { return is_set(a.keep, batch, row); };
    kept = count_columns(is_kept, static_cast<int>(a.keep.size[1]), scratch);
  }
  const int64_t k = raw.value(), room = a.capacity - kept, picks = k < room ? k : room;
  const int64_t size = a.features.size[1];
  return static_cast<int>(picks < 0 ? 0 : picks < size ? picks : size);
}

struct MaxMinScratch {
  Pick best[2][kWarp];
  BlockScratch<int> kept, written;
};

// One block a row; a thread has its distances in registers, four neighbouring columns at a time.
template <int PerThread>
__global__ void __launch_bounds__(1024) maxmin_held(SelectDiverse a, DiverseParts parts) {
  VTP_SHARED(MaxMinScratch, scratch);
  constexpr int kFours = PerThread / 4;
  const int64_t batch = blockIdx.x;
  const int size = static_cast<int>(a.features.size[1]);
  const auto column_at = [](int i) {
    return static_cast<int>((i / 4 * blockDim.x + threadIdx.x) * 4 + i % 4);
  };
  int left = picks_of(a, batch, scratch.kept);
  await_earlier_kernels();
  float distance[PerThread];
  bool anchored = false;
#pragma unroll
  for (int four = 0; four < kFours; ++four) {
    const int first = column_at(4 * four);
    Fours start = {kAbsent, kAbsent, kAbsent, kAbsent};
    if (first < parts.stride) start.load(parts.state + batch * parts.stride + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) distance[4 * four + i] = start.x[i];
  }
  // What was kept is an anchor for all candidates, or for none.
  if (parts.near) {
#pragma unroll
    for (int i = 0; i < PerThread; ++i) {
      const float* near = parts.near + batch * parts.stride + column_at(i);
      if (distance[i] > kOdd) anchored = *near < INFINITY;
    }
  }
  const auto best_of_thread = [&] {
    float best = kAbsent;
    int at = INT_MAX;
#pragma unroll
    for (int i = 0; i < PerThread; ++i) {
      const bool is_better = distance[i] > best;
      best = is_better ? distance[i] : best;
      at = is_better ? column_at(i) : at;
    }
    return pick_of(best, at);
  };
  const float* const matrix = parts.matrix + batch * size * parts.stride;
  for (int step = 0; left > 0; ++step) {
    const Pick best = block_best(best_of_thread(), scratch.best[step % 2]);
    if (!best.exists()) break;
    --left;
    const bool is_anchor = best.key != kOddKey && left > 0;
    Fours read[kFours];
#pragma unroll
    for (int four = 0; four < kFours; ++four) read[four] = {INFINITY, INFINITY, INFINITY, INFINITY};
    if (is_anchor) {
      // Past the end anything will do: without a test of each, all are under way at once.
      const float* row = matrix + int64_t{best.column} * parts.stride;
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        const int first = column_at(4 * four);
        read[four].load(row + (first < parts.stride ? first : 0));
      }
    }
#pragma unroll
    for (int i = 0; i < PerThread; ++i) {
      const bool is_new = step == 0 && !anchored && distance[i] > kOdd;
      const float before = is_new ? INFINITY : distance[i];
      distance[i] = column_at(i) == best.column ? kChosen : fminf(before, read[i / 4].x[i % 4]);
    }
  }
  float* const state = parts.state + batch * parts.stride;
#pragma unroll
  for (int four = 0; four < kFours; ++four) {
    const int first = column_at(4 * four);
    Fours out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.x[i] = distance[4 * four + i];
    if (first < parts.stride) out.store(state + first);
  }
  __syncthreads();
  int64_t* const indices = a.indices + batch * a.capacity;
  const auto is_chosen = [&](int column) { return state[column] == kChosen; };
  const int count =
      write_columns(is_chosen, 0, size, 0, a.capacity, indices, scratch.written);
  write_rest(count, a.capacity, indices, a.counts + batch);
}

// --- a row that blocks may share --------------------------------------------------------------

// Rows are told apart by their weight in dpp: more than 0 where they may be chosen.
constexpr float kPending = -1.0f;  // kept, and yet to be conditioned on
constexpr float kDone = -2.0f;     // chosen, or kept

// The columns of one block of those that share a row.
struct Columns {
  int begin, end;
  int each;  // of every block, but for the last ones

  VTP_DEVICE static Columns of_block(int size) {
    const int words = (size + kWarp - 1) / kWarp, blocks = cluster_blocks();
    const int each = (words + blocks - 1) / blocks * kWarp;
    const int begin = cluster_rank() * each, end = begin + each;
    return {begin < size ? begin : size, end < size ? end : size, each};
  }
};

struct GreedyScratch {
  Pick best[2][kClusterBlocks * kWarp];
  BlockScratch<int> kept, before, written;
};

// The sum over t < count, in four parts whose order count alone decides. Both are aligned to 16
// bytes; what lies behind them is not read.
VTP_DEVICE float dot(const float* a, const float* b, int count) {
  float sum[4] = {};
  int t = 0;
#pragma unroll 4
  for (; t + 4 <= count; t += 4) {
    const float4 x = *reinterpret_cast<const float4*>(a + t);
    const float4 y = *reinterpret_cast<const float4*>(b + t);
    sum[0] = fmaf(x.x, y.x, sum[0]);
    sum[1] = fmaf(x.y, y.y, sum[1]);
    sum[2] = fmaf(x.z, y.z, sum[2]);
    sum[3] = fmaf(x.w, y.w, sum[3]);
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (t + i < count) sum[i] = fmaf(a[t + i], b[t + i], sum[i]);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Cosines of a warp's 32 columns with row `pick`, each lane's where it is `wanted`.
template <class T, bool OnTheFly>
struct CosineSource {
  FeatureRows<T> rows;
  const float* squares;
  const float* matrix;  // of distances in maxmin, which asks for none of these
  int stride;

  VTP_DEVICE CosineSource(const SelectDiverse& a, const DiverseParts& parts, int64_t batch,
                          bool aligned)
      : rows(FeatureRows<T>::of(a, batch, aligned)),
        squares(parts.squares + batch * parts.stride),
        matrix(parts.matrix + batch * rows.count * parts.stride),
        stride(parts.stride) {}

  VTP_DEVICE float operator()(int pick, int base, bool wanted) const {
    const int column = base + lane_id();
    if constexpr (!OnTheFly) {
      return wanted ? matrix[int64_t{pick} * stride + column] : 0.0f;
    } else {
      constexpr int kAtOnce = 4;
      const unsigned all = __ballot_sync(kAllLanes, wanted);
      float product = 0.0f;
      for (int first = 0; first < kWarp; first += kAtOnce) {
        if ((all >> first & ((1u << kAtOnce) - 1)) == 0) continue;
        int others[kAtOnce];
        float products[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int other = base + first + i;
          others[i] = other < rows.count ? other : rows.count - 1;
        }
        row_products(rows, pick, others, products);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          product = lane_id() == first + i ? products[i] : product;
        }
      }
      const float own = squares[pick], other = wanted ? squares[column] : NAN;
      float cosine = plain_cosine(product, own, other);
      for_lost(rows, pick, column, is_lost(own, other), [&](int lane, float found) {
        cosine = lane_id() == lane ? found : cosine;
      });
      return cosine;
    }
  }
};

// One step of max-min for a thread's columns.
struct MaxMin {
  float* state;
  bool anchored = false;

  VTP_DEVICE MaxMin(const DiverseParts& parts, int64_t batch)
      : state(parts.state + batch * parts.stride) {}

  VTP_DEVICE Pick start(const SelectDiverse&, const DiverseParts& parts, int64_t batch, int column) {
    const float distance = state[column];
    if (parts.near && distance > kOdd) {
      anchored = parts.near[batch * parts.stride + column] < INFINITY;
    }
    return pick_of(distance, column);
  }

  VTP_DEVICE static bool counts(const Pick&) { return true; }
  VTP_DEVICE void mark(int column) { state[column] = kChosen; }
  VTP_DEVICE bool is_chosen(int column) const { return state[column] == kChosen; }

  template <class Source>
  VTP_DEVICE void update(const Pick& pick, int step, const Source& cosine, const Columns& columns,
                         Pick& best) {
    const bool is_anchor = pick.key != kOddKey, is_new = step == 0 && !anchored;
    for (int base = columns.begin + warp_id() * kWarp; base < columns.end; base += blockDim.x) {
      const int column = base + lane_id();
      const float before = column < columns.end ? state[column] : kAbsent;
      float distance = before;
      if (is_anchor) {
        const bool is_open = before > kOdd;
        const float now = 1.0f - cosine(pick.column, base, is_open);
        if (is_open) distance = fminf(is_new ? INFINITY : before, now);
        if (is_open) state[column] = distance;
      }
      const Pick own = pick_of(distance, column);
      best.consider(own.key, own.column);
    }
  }
};

// One step of dpp. `left` is what of a row's square no row chosen so far explains; the rows of the
// Cholesky factor are those of the cosines, whatever the relevance.
template <bool InShared>
struct Dpp {
  static constexpr float kTolerance = static_cast<float>(kNothingLeft);

  float *state, *weight, *factor;
  float* picked;  // a copy of the row of factors of the row chosen, where the row is shared
  int first, factor_stride, conditioned = 0;

  VTP_DEVICE Dpp(const DiverseParts& parts, int64_t batch, int size, const Columns& columns,
                 unsigned char* shared)
      : state(parts.state + batch * parts.stride),
        weight(parts.weight + batch * parts.stride),
        factor_stride(parts.factor_stride) {
    if constexpr (InShared) {
      picked = reinterpret_cast<float*>(shared);
      factor = picked + factor_stride;
      first = columns.begin;
    } else {
      picked = nullptr;
      factor = parts.factor + batch * size * factor_stride;
      first = 0;
    }
  }

  VTP_DEVICE float* factors_of(int column) const {
    return factor + int64_t{column - first} * factor_stride;
  }

  VTP_DEVICE static Pick pick_of(float left, float weight, int column) {
    if (!(left > kTolerance)) return Pick::none();
    if (weight == kPending) return {kKeptKey, column};
    return weight > 0.0f ? Pick{sortable(weight * sqrtf(left)), column} : Pick::none();
  }

  VTP_DEVICE Pick start(const SelectDiverse& a, const DiverseParts& parts, int64_t batch,
                        int column) {
    const float square = parts.squares[batch * parts.stride + column];
    float mine = 0.0f;
    if (a.keep && is_set(a.keep, batch, column)) {
      mine = has_part(square) ? kPending : kDone;
    } else if (has_part(square)) {
      mine = 1.0f;
      if (a.relevance) mine = fabsf(*view_as<const float>(a.relevance).at(batch, column));
      if (!(mine < INFINITY)) mine = 0.0f;
    }
    const float left = square == 0.0f ? 0.0f : 1.0f;
    state[column] = left;
    weight[column] = mine;
    return pick_of(left, mine, column);
  }

  VTP_DEVICE static bool counts(const Pick& pick) { return pick.key != kKeptKey; }
  VTP_DEVICE void mark(int column) { weight[column] = kDone; }
  VTP_DEVICE bool is_chosen(int column) const { return weight[column] < 0.0f; }

  // The factors of the row chosen, by all threads.
  VTP_DEVICE const float* factors_of_pick(int column, const Columns& columns) const {
    if constexpr (InShared) {
      if (cluster_blocks() > 1) {
        const int owner = column / columns.each;
        float* own = factor + int64_t{column - owner * columns.each} * factor_stride;
        const float* theirs = map_shared_rank(own, owner);
        for (int t = threadIdx.x; t < conditioned; t += blockDim.x) picked[t] = theirs[t];
        __syncthreads();
        return picked;
      }
    }
    return factors_of(column);
  }

  template <class Source>
  VTP_DEVICE void update(const Pick& pick, int, const Source& cosine, const Columns& columns,
                         Pick& best) {
    const float pivot = sqrtf(state[pick.column]);
    const float* const chosen = factors_of_pick(pick.column, columns);
    for (int base = columns.begin + warp_id() * kWarp; base < columns.end; base += blockDim.x) {
      const int column = base + lane_id();
      const bool inside = column < columns.end;
      const float before = inside ? state[column] : 0.0f, own = inside ? weight[column] : 0.0f;
      const bool is_open = pick_of(before, own, column).exists();
      const float product = cosine(pick.column, base, is_open);
      if (is_open) {
        float* const mine = factors_of(column);
        const float factor = (product - dot(mine, chosen, conditioned)) / pivot;
        const float left = before - factor * factor;
        mine[conditioned] = factor;
        state[column] = left;
        const Pick now = pick_of(left, own, column);
        best.consider(now.key, now.column);
      }
    }
    ++conditioned;
  }
};

// All steps of a row, by a block or, each block with columns of its own, by a cluster.
template <class Source, class Steps>
VTP_DEVICE void greedy_row(const SelectDiverse& a, const DiverseParts& parts, int64_t batch,
                           int left, const Source& cosine, Steps& steps, const Columns& columns,
                           GreedyScratch& scratch) {
  Pick mine = Pick::none();
  for (int column = columns.begin + threadIdx.x; column < columns.end; column += blockDim.x) {
    const Pick own = steps.start(a, parts, batch, column);
    mine.consider(own.key, own.column);
  }
  cluster_wait();  // all blocks have begun
  for (int step = 0; left > 0; ++step) {
    const Pick best = cluster_best<kClusterBlocks>(mine, scratch.best[step % 2]);
    if (!best.exists()) break;
    if (steps.counts(best)) --left;
    const int place = best.column - columns.begin;
    const bool is_mine = best.column >= columns.begin && best.column < columns.end &&
                         place % static_cast<int>(blockDim.x) == static_cast<int>(threadIdx.x);
    if (is_mine) steps.mark(best.column);
    if (left == 0) break;
    mine = Pick::none();
    steps.update(best, step, cosine, columns, mine);
  }
  cluster_sync();  // all blocks know what was chosen, and are done with each other
  const auto is_chosen = [&](int column) { return steps.is_chosen(column); };
  const int before = count_columns(is_chosen, columns.begin, scratch.before);
  int64_t* const indices = a.indices + batch * a.capacity;
  const int behind = write_columns(is_chosen, columns.begin, columns.end, before, a.capacity,
                                   indices, scratch.written);
  if (cluster_rank() == cluster_blocks() - 1) {
    write_rest(behind, a.capacity, indices, a.counts + batch);
  }
}

constexpr int kClusterThreads = 256, kBlockThreads = 512;

template <class T, Diversity Rule, bool OnTheFly, bool InShared>
__global__ void __launch_bounds__(kBlockThreads, 1)
    greedy(SelectDiverse a, DiverseParts parts, bool aligned) {
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(GreedyScratch, scratch);
  cluster_arrive();
  const int64_t batch = blockIdx.x / static_cast<unsigned>(cluster_blocks());
  const int size = static_cast<int>(a.features.size[1]);
  const Columns columns = Columns::of_block(size);
  const int left = picks_of(a, batch, scratch.kept);
  await_earlier_kernels();
  const CosineSource<T, OnTheFly> cosine(a, parts, batch, aligned);
  if constexpr (Rule == Diversity::maxmin) {
    (void)shared;
    MaxMin steps(parts, batch);
    greedy_row(a, parts, batch, left, cosine, steps, columns, scratch);
  } else {
    Dpp<InShared> steps(parts, batch, size, columns, shared);
    greedy_row(a, parts, batch, left, cosine, steps, columns, scratch);
  }
}

// --- host -------------------------------------------------------------------------------------

constexpr int64_t kMostMatrixRows = 16384;
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kFewHeld = 1024;  // columns of which a thread holds four; beyond that, sixteen

int64_t element_bytes(const SelectDiverse& a) { return a.features.dtype == DType::f32 ? 4 : 2; }

bool has_matrix(const SelectDiverse& a) {
  const int64_t row_bytes = a.features.size[2] * element_bytes(a);
  return a.features.size[1] <= kMostMatrixRows && row_bytes > kSectorBytes;
}

int64_t stride_of(const SelectDiverse& a) { return divide_up(a.features.size[1], 32) * 32; }

// How many rows the factor of dpp may come to have.
int64_t factor_rows(const SelectDiverse& a) {
  const int64_t most = std::min(a.capacity, a.features.size[1]);
  return a.keep || a.k_per_row ? most : std::min(most, a.k);
}

size_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "select_diverse");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "select_diverse");
  return static_cast<size_t>(bytes);
}

// How the steps of a call are shared out. What comes out has the same bits either way.
struct GreedyPlan {
  bool in_cluster = false, in_shared = false;
  int64_t factor_stride = 0;
  size_t shared_bytes = 0;

  int blocks() const { return in_cluster ? kClusterBlocks : 1; }
};

// Whether the current device runs the kernel in clusters, with as much shared memory as a block may
// have: then it does with less.
template <class Kernel>
bool runs_in_clusters(Kernel* kernel, bool in_shared) {
  const size_t most = in_shared ? shared_limit() - sizeof(GreedyScratch) : 0;
  return clusters_at_once("select_diverse", kernel, kClusterBlocks, kClusterThreads, most) > 0;
}

// f(kernel) for the kernel that takes the steps of a call.
template <class F>
void with_greedy(const SelectDiverse& a, bool in_shared, const F& f) {
  constexpr auto maxmin = Diversity::maxmin, dpp = Diversity::dpp;
  if (has_matrix(a)) {
    if (in_shared) return f(greedy<float, dpp, false, true>);
    return f(greedy<float, dpp, false, false>);
  }
  with_type(a.features.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.rule == maxmin) return f(greedy<T, maxmin, true, false>);
    f(greedy<T, dpp, true, false>);
  });
}

bool holds_distances(const SelectDiverse& a) {
  return a.rule == Diversity::maxmin && has_matrix(a);
}

GreedyPlan plan_of(const SelectDiverse& a) {
  GreedyPlan plan;
  if (holds_distances(a)) return plan;
  const bool is_dpp = a.rule == Diversity::dpp;
  const auto set_up = [&](bool in_shared) {
    with_greedy(a, in_shared,
                [&](auto kernel) { plan.in_cluster = runs_in_clusters(kernel, in_shared); });
    plan.in_shared = in_shared;
    plan.factor_stride = is_dpp ? divide_up(factor_rows(a), 4) * 4 : 0;
    if (!in_shared) return;
    // Neighbouring threads read neighbouring rows, 16 bytes at a time, from different banks.
    plan.factor_stride += (36 - plan.factor_stride % 32) % 32;
    const int64_t columns = divide_up(stride_of(a) / 32, plan.blocks()) * 32;
    plan.shared_bytes = (columns + 1) * plan.factor_stride * sizeof(float);
  };
  set_up(is_dpp && has_matrix(a));
  const size_t most = shared_limit() - sizeof(GreedyScratch);
  if (plan.in_shared && plan.shared_bytes > most) {
    plan = {};
    set_up(false);
  }
  return plan;
}

DiverseParts diverse_parts(const SelectDiverse& a, const GreedyPlan& plan, Pieces& workspace) {
  const int64_t batch = a.features.size[0], size = a.features.size[1], stride = stride_of(a);
  DiverseParts parts;
  parts.stride = static_cast<int>(stride);
  if (has_matrix(a)) parts.matrix = workspace.take<float>(batch * size * stride);
  parts.squares = workspace.take<float>(batch * stride);
  parts.state = workspace.take<float>(batch * stride);
  if (a.rule == Diversity::maxmin) {
    if (a.keep) parts.near = workspace.take<float>(batch * stride);
    return parts;
  }
  parts.weight = workspace.take<float>(batch * stride);
  parts.factor_stride = static_cast<int>(plan.factor_stride);
  if (!plan.in_shared) {
    parts.factor = workspace.take<float>(batch * size * plan.factor_stride);
  }
  return parts;
}

template <class T, int Tile>
void launch_products(const SelectDiverse& a, const DiverseParts& parts, bool aligned,
                     OpStream& stream) {
  using Products = ProductTile<T, Tile>;
  const int64_t tiles = divide_up(a.features.size[1], Tile), pairs = tiles * (tiles + 1) / 2;
  launch("select_diverse: products", products<T, Tile>, dim3(a.features.size[0] * pairs),
         Products::kThreads, Products::kShared, stream, a, parts, aligned, pairs);
}

template <class T>
void launch_matrix(const SelectDiverse& a, const DiverseParts& parts, bool aligned,
                   OpStream& stream) {
  const int64_t batch = a.features.size[0], size = a.features.size[1];
  const int64_t tiles = divide_up(size, 128), large = batch * (tiles * (tiles + 1) / 2);
  // From here on large tiles take no longer than four times as many small ones, and half of L2's
  // time. float32 takes more registers than there are.
  constexpr int64_t kEnough = sizeof(T) == 2 ? 28 : INT64_MAX;
  if (large >= kEnough) {
    launch_products<T, sizeof(T) == 2 ? 128 : 64>(a, parts, aligned, stream);
  } else {
    launch_products<T, 64>(a, parts, aligned, stream);
  }
  const int64_t blocks = parts.stride / (kCosineThreads / kWarp);
  launch("select_diverse: cosines", cosines<T>, dim3(batch * blocks), kCosineThreads, 0, stream, a,
         parts, aligned, blocks);
}

template <class T>
void launch_squares(const SelectDiverse& a, const DiverseParts& parts, bool aligned,
                    OpStream& stream) {
  const int64_t batch = a.features.size[0], size = a.features.size[1];
  const int64_t blocks = divide_up(size, kCosineThreads / kWarp);
  launch("select_diverse: squares", row_squares<T>, dim3(batch * blocks), kCosineThreads, 0,
         stream, a, parts, aligned, blocks);
  if (a.rule != Diversity::maxmin) return;
  using Tile = ProductTile<T, kNearestTile>;
  const int64_t tiles = divide_up(size, kNearestTile);
  launch("select_diverse: nearest", nearest_rows<T>, dim3(batch * tiles), Tile::kThreads,
         Tile::kShared, stream, a, parts, aligned, tiles);
}

void launch_maxmin(const SelectDiverse& a, const DiverseParts& parts, OpStream& stream) {
  const bool few = a.features.size[1] <= kFewHeld;
  const int64_t warps = divide_up(a.features.size[1], (few ? 4 : 16) * kWarp);
  const int64_t threads = std::max<int64_t>(warps, 1) * kWarp;
  launch("select_diverse: max-min", few ? maxmin_held<4> : maxmin_held<16>,
         dim3(a.features.size[0]), dim3(threads), 0, stream, a, parts);
}

void launch_greedy(const SelectDiverse& a, const DiverseParts& parts, const GreedyPlan& plan,
                   bool aligned, OpStream& stream) {
  const auto batch = static_cast<unsigned>(a.features.size[0]);
  with_greedy(a, plan.in_shared, [&](auto kernel) {
    if (plan.in_cluster) {
      launch(LaunchOptions{kClusterBlocks}, "select_diverse in clusters", kernel,
             dim3(batch * kClusterBlocks), kClusterThreads, plan.shared_bytes, stream, a, parts,
             aligned);
    } else {
      launch("select_diverse: steps", kernel, dim3(batch), kBlockThreads, plan.shared_bytes,
             stream, a, parts, aligned);
    }
  });
}

}  // namespace

size_t select_diverse_workspace(const SelectDiverse& a) {
  Pieces pieces(nullptr);
  diverse_parts(a, plan_of(a), pieces);
  return pieces.bytes();
}

void select_diverse(const SelectDiverse& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  const GreedyPlan plan = plan_of(a);
  Pieces pieces(workspace);
  const DiverseParts parts = diverse_parts(a, plan, pieces);
  const bool aligned = rows_are_aligned(a.features);
  with_type(a.features.dtype, [&](auto type) {
    using T = decltype(type);
    if (has_matrix(a)) {
      launch_matrix<T>(a, parts, aligned, ours);
    } else {
      launch_squares<T>(a, parts, aligned, ours);
    }
  });
  if (holds_distances(a)) return launch_maxmin(a, parts, ours);
  launch_greedy(a, parts, plan, aligned, ours);
}

}  // namespace vtp::cuda
