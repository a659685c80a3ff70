// Attention received by every key, without an attention matrix in memory.
//
// One kernel, key_pass, streams K: a block holds 128 keys of one KV head (64 of more than 256 bytes)
// in registers and meets all query rows of the heads that share them, so a pass reads K once. Where
// they are many, compute capability 9.0 has another for it, in attention_scores_warpgroup.cu. What
// runs depends on the rows:
//
//   log-sum-exp given     columns pass                          scores
//   up to 16 rows         statistics pass, keeping its logits   scores
//   more                  statistics pass, merge_statistics, columns pass, scores
//
// The statistics pass leaves maximum and sum of every row over the block's keys; the columns pass,
// which knows the rows' softmax, adds up the weights of its keys over the rows, every key being one
// lane's own. Writing and reading back the logits of 16 rows moves 128 bytes a key, no more than K
// itself does at D = 64; more rows are cheaper to compute twice. Block sizes are constants, sums
// have one order and nothing is added atomically: same bits on every run and in any batch.
//
// A block asks for its keys, their masks and its first query rows at once and looks at none of them
// before that. Keys wait for their masks only where that spares reading them from DRAM; positions
// of query rows say what counts, not what is read.
#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/joined_ops.cuh"
#include "vtp/key_pass.cuh"
#include "vtp/key_tile.cuh"

namespace vtp::cuda {
namespace {

constexpr int kFewRows = 16;

template <class T, int Chunks>
struct PassShared {
  using Keys = KeyTile<T, Chunks>;
  static constexpr int kRows = kThreads / Chunks;  // query rows at a time: 8 KB
  static constexpr int kSteps = kRows / Keys::kQueries;
  static_assert(kRows % Keys::kQueries == 0 && kRows <= kThreads);

  int4 queries[2][kSteps][Keys::kQueryUnits];
  RowWeight weights[2][kRows];
  RowStatistic statistics[2][kWarps][kRows];
};

// --- query rows -------------------------------------------------------------------------------

// A thread's share of a tile of query rows on its way to shared memory: four units of 16 bytes, and
// what makes one row's constants. Between load and store lies the work on the tile before, so what
// is loaded is not looked at.
template <class T, int Chunks, Pass P>
struct Staged {
  using Keys = KeyTile<T, Chunks>;
  using Shared = PassShared<T, Chunks>;
  using Rows = RowTile<Shared::kRows>;
  static constexpr int kWarpsPerStep = kWarps / Shared::kSteps;  // share a step's chunks
  static constexpr int kChunks = Chunks / kWarpsPerStep;         // each
  static_assert(kWarps % Shared::kSteps == 0 && Chunks % kWarpsPerStep == 0);

  int4 unit[kChunks][Keys::kLaneQueries];
  RawWeight<P> weight;

  static VTP_DEVICE int step() { return warp_id() / kWarpsPerStep; }
  static VTP_DEVICE int chunk(int c) { return warp_id() % kWarpsPerStep * kChunks + c; }

  VTP_DEVICE void load(const PassArguments& p, const Block& block, const Rows& rows) {
    const auto query = view_as<const T>(p.a.query);
    const int dim = static_cast<int>(query.size[3]);
#pragma unroll
    for (int i = 0; i < Keys::kLaneQueries; ++i) {
      const int row = step() * Keys::kQueries + lane_id() / 4 + 8 * i;
      const bool exists = row < rows.count;
      const QueryRow at(p, block, rows.first + (exists ? row : 0));
      const T* source = query.at(block.batch, at.head, at.m);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int first = (4 * chunk(c) + lane_id() % 4) * Keys::kUnitSize;
        unit[c][i] = int4{0, 0, 0, 0};
        if (exists && first < dim) unit[c][i] = *reinterpret_cast<const int4*>(source + first);
      }
    }
    const int row = static_cast<int>(threadIdx.x);
    if (row < rows.count) weight.load(p, block, QueryRow(p, block, rows.first + row));
  }

  VTP_DEVICE void store(const PassArguments& p, Shared& shared, const Rows& rows,
                        int buffer) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Keys::store_query(shared.queries[buffer][step()], chunk(c), unit[c]);
    }
    const int row = static_cast<int>(threadIdx.x);
    if (row < Shared::kRows) {
      shared.weights[buffer][row] = row < rows.count ? weight.weight(p) : RowWeight{0.0f, 0.0f, -1};
    }
  }
};

// --- keys -------------------------------------------------------------------------------------

// --- the pass ---------------------------------------------------------------------------------

// One warp's keys against kQueries rows in shared memory.
template <class T, int Chunks>
struct Warp {
  using Keys = KeyTile<T, Chunks>;
  static constexpr int kGroups = Keys::kGroups, kLaneQueries = Keys::kLaneQueries;

  const PassArguments& p;
  const Block& block;
  const Keys& keys;
  int first;
  unsigned all, wanted;  // bits of the keys: a whole tile's, those the pass has to do with

  // Which keys the lane's rows attend to. The bit of the lane's key (n, j) is 8 n + j.
  struct Attends {
    unsigned keys[kLaneQueries];
    bool any, every;  // over the warp

    VTP_DEVICE bool operator()(int i, int n, int j) const {
      return keys[i] & (1u << (8 * n + j));
    }
  };

  VTP_DEVICE Attends attends(const RowWeight* weights) const {
    Attends attends;
    bool any = false, every = true;
#pragma unroll
    for (int i = 0; i < kLaneQueries; ++i) {
      const unsigned bits = wanted & bits_until(weights[Keys::query_of(i)].last, first);
      any = any || bits != 0;
      every = every && bits == all;
      attends.keys[i] = bits >> Keys::key_of(0, 0);
    }
    attends.any = __any_sync(kAllLanes, any);
    attends.every = __all_sync(kAllLanes, every);
    return attends;
  }

  // Statistics of the warp's keys into out[kQueries], logits to the workspace.
  VTP_DEVICE void add_statistics(const int4* queries, const RowWeight* weights, int first_row,
                                 int row_count, RowStatistic* out) const {
    const Attends attends = this->attends(weights);
    if (!attends.any) {
      if (lane_id() < Keys::kQueries) out[lane_id()] = no_logits();
      return;
    }
    auto logits = keys.multiply(queries, static_cast<int>(p.a.query.size[3]));
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * kLaneQueries; ++i) logits.x[n][i] *= p.factor;
    }
    if (p.parts.few_rows) store_logits(logits, first_row, row_count);
    if (!attends.every) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 2 * kLaneQueries; ++i) {
          if (!attends(i / 2, n, i % 2)) logits.x[n][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneQueries; ++i) {
      const RowStatistic statistic = statistic_of(logits, i);
      if (lane_id() % 4 == 0) out[Keys::query_of(i)] = statistic;
    }
  }

  // Of the lane's row i, over the warp's keys.
  static VTP_DEVICE RowStatistic statistic_of(const typename Keys::Products& logits, int i) {
    float maximum = -INFINITY, sum = 0.0f;  // fmaxf ignores NaN, the sum does not
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      maximum = fmaxf(maximum, fmaxf(logits.at(i, n, 0), logits.at(i, n, 1)));
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
    const float base = finite_base(maximum);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      sum += fast_exp2(logits.at(i, n, 0) - base) + fast_exp2(logits.at(i, n, 1) - base);
    }
    return {maximum, warp_sum<4>(sum)};
  }

  // Of all keys, since the workspace has room for whole tiles; what nobody wants is never read.
  VTP_DEVICE void store_logits(const typename Keys::Products& logits, int first_row,
                               int row_count) const {
    const int64_t number = block.kv_head * p.group * p.a.query.size[2] + first_row;
    float* out = p.parts.logits + (block.batch * p.parts.rows + number) * p.parts.stride + first;
#pragma unroll
    for (int i = 0; i < kLaneQueries; ++i) {
      const int row = Keys::query_of(i);
      if (row >= row_count) continue;
      float* row_out = out + row * p.parts.stride + Keys::key_of(0, 0);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const float2 pair = {logits.at(i, n, 0), logits.at(i, n, 1)};
        *reinterpret_cast<float2*>(row_out + 8 * n) = pair;
      }
    }
  }

  // Adds the weights of the lane's rows to its keys' columns.
  VTP_DEVICE void add_columns(const int4* queries, const RowWeight* weights,
                              float (&sum)[kGroups][2]) const {
    const Attends attends = this->attends(weights);
    if (!attends.any) return;
    const auto products = keys.multiply(queries, static_cast<int>(p.a.query.size[3]));
    if (attends.every) {
      add_weights(products, weights, sum, [](int, int, int) { return true; });
    } else {
      add_weights(products, weights, sum, attends);
    }
  }

  template <class Attended>
  VTP_DEVICE void add_weights(const typename Keys::Products& products, const RowWeight* weights,
                              float (&sum)[kGroups][2], const Attended& attended) const {
#pragma unroll
    for (int i = 0; i < kLaneQueries; ++i) {
      const RowWeight row = weights[Keys::query_of(i)];
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float weight = fast_exp2(fmaf(products.at(i, n, j), p.factor, -row.base));
          const float with_row = fmaf(weight, row.share, sum[n][j]);
          sum[n][j] = attended(i, n, j) ? with_row : sum[n][j];
        }
      }
    }
  }
};

// Writes the statistics of a row tile, warps merged in order.
template <int Rows>
VTP_DEVICE void write_statistics(const PassArguments& p, const Block& block,
                                 const RowTile<Rows>& rows,
                                 const RowStatistic (&warps)[kWarps][Rows]) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= rows.count) return;
  RowStatistic statistic = warps[0][i];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) statistic = merge(statistic, warps[warp][i]);
  const int64_t number = block.kv_head * p.group * p.a.query.size[2] + rows.first + i;
  p.parts.statistics[(block.batch * p.parts.tiles + block.tile) * p.parts.rows + number] =
      statistic;
}

// What was added up over the rows of a segment becomes a head's column; of several, the largest.
template <int Groups>
VTP_DEVICE void end_segment(float (&sum)[Groups][2], float (&column)[Groups][2]) {
#pragma unroll
  for (int n = 0; n < Groups; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        sum[n][j] += __shfl_xor_sync(kAllLanes, sum[n][j], distance);
      }
      column[n][j] = larger(column[n][j], sum[n][j]);
      sum[n][j] = 0.0f;
    }
  }
}

template <int Groups>
VTP_DEVICE void write_columns(const PassArguments& p, const Block& block, int first,
                              const float (&column)[Groups][2]) {
  if (lane_id() >= 4) return;
  const int64_t row = block.batch * p.a.key.size[1] + block.kv_head;
  float* out = p.parts.columns + row * p.parts.stride + first + 2 * lane_id();
#pragma unroll
  for (int n = 0; n < Groups; ++n) {
    *reinterpret_cast<float2*>(out + 8 * n) = float2{column[n][0], column[n][1]};
  }
}

template <int Chunks>
constexpr int kBlocksPerMultiprocessor = Chunks <= 2 ? 4 : Chunks <= 8 ? 3 : 2;

template <class T, int Chunks, Pass P>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<Chunks>)
    key_pass(const PassArguments p) {
  using Keys = KeyTile<T, Chunks>;
  using Shared = PassShared<T, Chunks>;
  using Rows = RowTile<Shared::kRows>;
  VTP_SHARED(Shared, shared);
  release_next_kernel();
  const Block block = block_of(p);
  const int first = (block.tile * kWarps + warp_id()) * Keys::kKeys;
  WarpKeys<P> own(p.a, first, Keys::kKeys);
  if (own.masks_come_first(p.a)) own.load_masks(p.a, block.batch, first);
  if (p.parts.key_copy) await_earlier_kernels();  // else keys are given: there before the others
  const auto key = view_as<const T>(p.a.key);
  Keys keys;
  keys.load(key.at(block.batch, block.kv_head, first), key.stride[2], own.read(p.a),
            static_cast<int>(key.size[3]));
  if (!own.masks_come_first(p.a)) own.load_masks(p.a, block.batch, first);
  await_earlier_kernels();
  Rows rows(p);
  Staged<T, Chunks, P> staged;
  staged.load(p, block, rows);

  staged.store(p, shared, rows, 0);
  if (!__syncthreads_or(own.is_wanted())) {
    if (P == Pass::statistics) write_no_statistics(p, block);
    return;
  }
  const unsigned all = bits_until(Keys::kKeys - 1, 0);
  const Warp<T, Chunks> warp = {p, block, keys, first, all, own.wanted()};
  float sum[Keys::kGroups][2] = {}, column[Keys::kGroups][2] = {};
  for (int buffer = 0; rows.exists(p); buffer = 1 - buffer) {
    const Rows next = rows.next(p);
    if (next.exists(p)) staged.load(p, block, next);
    for (int step = 0; step * Keys::kQueries < rows.count; ++step) {
      const int row = step * Keys::kQueries;
      const int4* queries = shared.queries[buffer][step];
      const RowWeight* weights = shared.weights[buffer] + row;
      if constexpr (P == Pass::statistics) {
        warp.add_statistics(queries, weights, rows.first + row, rows.count - row,
                            shared.statistics[buffer][warp_id()] + row);
      } else {
        warp.add_columns(queries, weights, sum);
      }
    }
    if (P == Pass::columns && rows.ends_segment()) end_segment(sum, column);
    if (next.exists(p)) staged.store(p, shared, next, 1 - buffer);
    __syncthreads();  // the next tile is there, and this one's statistics are
    if (P == Pass::statistics) write_statistics(p, block, rows, shared.statistics[buffer]);
    rows = next;
  }
  if (P == Pass::columns) write_columns(p, block, first, column);
}

// --- the rest ---------------------------------------------------------------------------------

// Copies rows to where 16-byte loads can serve them, filled up with zeros; a thread per 16 bytes.
// Misaligned rows are rare: they are better copied than a burden on every pass.
template <class T>
__global__ void __launch_bounds__(kThreads)
    align_rows(const View<const T, 4> source, T* target, int units) {
  release_next_kernel();
  await_earlier_kernels();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = unit / units, heads = source.size[1], length = source.size[2];
  const int first = static_cast<int>(unit % units) * kVectorSize<T>;
  if (row >= source.size[0] * heads * length) return;
  const T* from = source.at(row / length / heads, row / length % heads, row % length);
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    vector.x[i] = first + i < source.size[3] ? from[first + i] : from_float<T>(0.0f);
  }
  *reinterpret_cast<Vector<T>*>(target + unit * kVectorSize<T>) = vector;
}

constexpr int kMergeRows = kWarp, kMergeThreads = kMergeRows * kStatisticParts;
using MergeShared = RowStatistic[kStatisticParts][kMergeRows];

// A thread for each part of a row.
__global__ void __launch_bounds__(kMergeThreads) merge_statistics(const AttentionParts parts) {
  VTP_SHARED(MergeShared, shared);
  release_next_kernel();
  await_earlier_kernels();
  const int64_t blocks = divide_up(parts.rows, kMergeRows);
  const int64_t batch = blockIdx.x / blocks, row = blockIdx.x % blocks * kMergeRows + lane_id();
  RowStatistic own = no_logits();
  if (row < parts.rows) own = merged_part(parts, batch, row, warp_id());
  shared[warp_id()][lane_id()] = own;
  __syncthreads();
  if (warp_id() > 0 || row >= parts.rows) return;
  const auto part = [&](int i) { return i == 0 ? own : shared[i][lane_id()]; };
  parts.softmax[batch * parts.rows + row] = softmax_of_parts(part);
}

struct FinishShared {
  RowWeights weights;
  BlockScratch<int> scratch;
};

constexpr int kFinishBlocks = 6;  // a multiprocessor: leaves the loads of a thread 80 registers

// A thread per key.
__global__ void __launch_bounds__(kThreads, kFinishBlocks)
    finish_scores(const AttentionScores a, const AttentionParts parts, bool is_last) {
  VTP_SHARED(FinishShared, shared);
  if (!is_last) release_next_kernel();
  const int64_t length = a.key.size[2], blocks = divide_up(length, kThreads);
  const int64_t batch = blockIdx.x / blocks;
  const int key = static_cast<int>(blockIdx.x % blocks * kThreads + threadIdx.x);
  KeyMasks masks;
  masks.load(a, batch, key);
  const float factor = score_factor<kThreads>(a, batch, shared.scratch);
  await_earlier_kernels();
  const bool scored = masks.is_scored();
  float total = 0.0f;
  if (parts.few_rows) {
    HeadTotal sum(a);
    for (int64_t first = 0; first < parts.rows; first += kWeightRows) {
      const int64_t left = parts.rows - first;
      const int count = static_cast<int>(left < kWeightRows ? left : kWeightRows);
      __syncthreads();
      load_row_weights<kThreads>(a, parts, batch, first, shared.weights);
      __syncthreads();
      if (scored) add_rows(parts, batch, first, count, shared.weights, key, sum);
    }
    total = sum.total();
  } else if (scored) {
    total = reduce_columns(a, parts, batch, key);
  }
  if (key < length) static_cast<float*>(a.scores)[batch * length + key] = total * factor;
}

// --- host -------------------------------------------------------------------------------------

// Calls f(std::integral_constant) of the smallest head dimension compiled that holds `dim`.
template <class F>
void with_head_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

// Calls f with a (null) pointer to the KeyTile that serves these arguments.
template <class F>
void with_key_tile(const AttentionScores& a, const F& f) {
  with_type(a.query.dtype, [&](auto type) {
    using T = decltype(type);
    with_head_dim(a.query.size[3], [&](auto dim) {
      constexpr int kChunks = decltype(dim)::value * static_cast<int>(sizeof(T)) / 64;
      f(type, std::integral_constant<int, kChunks>{});
    });
  });
}

int64_t row_units(const Floats<4>& x) {
  const int64_t element = x.dtype == DType::f32 ? 4 : 2;
  return divide_up(x.size[3] * element, kVectorBytes);
}

// Room for a copy of rows that are not aligned.
void* take_copy(const Floats<4>& x, Pieces& workspace) {
  if (rows_are_aligned(x)) return nullptr;
  return workspace.take<int4>(x.size[0] * x.size[1] * x.size[2] * row_units(x));
}

// Puts the copy in the place of `x`.
void copy_rows(Floats<4>& x, void* copy, OpStream& stream) {
  if (rows_are_aligned(x)) return;
  const int64_t units = row_units(x), rows = x.size[0] * x.size[1] * x.size[2];
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(divide_up(rows * units, kThreads)));
    launch("attention_scores", align_rows<T>, grid, dim3(kThreads), 0, stream,
           view_as<const T>(x), static_cast<T*>(copy), static_cast<int>(units));
    x.size[3] = units * kVectorSize<T>;
  });
  x.data = copy;
  for (int i = 2; i >= 0; --i) x.stride[i] = x.size[i + 1] * (i == 2 ? 1 : x.stride[i + 1]);
}

template <Pass P>
void launch_pass(const AttentionScores& a, const AttentionParts& parts, OpStream& stream) {
  const int64_t group = a.query.size[1] / a.key.size[1], rows = a.query.size[2];
  const bool by_head = P == Pass::columns && a.head_reduce == HeadReduce::max;
  PassArguments p;
  p.a = a;
  p.parts = parts;
  p.group = static_cast<int>(group);
  p.segments = by_head ? p.group : 1;
  p.segment_rows = static_cast<int>(by_head ? rows : group * rows);
  p.factor = static_cast<float>(a.scale * kLog2e);
  const dim3 grid(static_cast<unsigned>(parts.tiles * a.key.size[1] * a.query.size[0]));
  if (launch_warpgroup_pass<P>(p, grid, stream)) return;
  with_key_tile(a, [&](auto type, auto chunks) {
    launch("attention_scores", key_pass<decltype(type), decltype(chunks)::value, P>, grid,
           dim3(kThreads), 0, stream, p);
  });
}

}  // namespace

AttentionParts attention_parts(const AttentionScores& a, Pieces& workspace) {
  const int64_t batch = a.query.size[0], heads = a.query.size[1], kv_heads = a.key.size[1];
  AttentionParts parts;
  parts.rows = heads * a.query.size[2];
  parts.query_copy = take_copy(a.query, workspace);
  parts.key_copy = take_copy(a.key, workspace);
  with_key_tile(a, [&](auto type, auto chunks) {
    constexpr int kKeys = kWarps * KeyTile<decltype(type), decltype(chunks)::value>::kKeys;
    parts.tiles = static_cast<int>(divide_up(a.key.size[2], kKeys));
    parts.stride = static_cast<int64_t>(parts.tiles) * kKeys;
  });
  const int64_t packed = heads / kv_heads * a.query.size[2];
  parts.few_rows = packed == 0 || (packed <= kFewRows && !a.lse);
  if (!a.lse) {
    parts.statistics = workspace.take<RowStatistic>(batch * parts.tiles * parts.rows);
    if (!parts.few_rows || parts.tiles > kStatisticParts) {
      parts.softmax = workspace.take<RowSoftmax>(batch * parts.rows);
    }
  }
  if (parts.few_rows) {
    parts.logits = workspace.take<float>(batch * parts.rows * parts.stride);
  } else {
    parts.columns = workspace.take<float>(batch * kv_heads * parts.stride);
  }
  return parts;
}

void compute_attention_parts(const AttentionScores& given, const AttentionParts& parts,
                             OpStream& stream) {
  if (parts.rows == 0) return;
  AttentionScores a = given;
  copy_rows(a.query, parts.query_copy, stream);
  copy_rows(a.key, parts.key_copy, stream);
  if (parts.statistics) launch_pass<Pass::statistics>(a, parts, stream);
  if (parts.softmax) {
    const int64_t blocks = divide_up(parts.rows, kMergeRows) * a.query.size[0];
    launch("attention_scores", merge_statistics, dim3(static_cast<unsigned>(blocks)),
           dim3(kMergeThreads), 0, stream, parts);
  }
  if (!parts.few_rows) launch_pass<Pass::columns>(a, parts, stream);
}

size_t attention_scores_workspace(const AttentionScores& a) {
  Pieces pieces(nullptr);
  attention_parts(a, pieces);
  return pieces.bytes();
}

void attention_scores(const AttentionScores& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  attention_scores(a, workspace, ours, true);
}

void attention_scores(const AttentionScores& a, void* workspace, OpStream& stream, bool is_last) {
  Pieces pieces(workspace);
  const AttentionParts parts = attention_parts(a, pieces);
  compute_attention_parts(a, parts, stream);
  const int64_t blocks = divide_up(a.key.size[2], kThreads) * a.query.size[0];
  launch("attention_scores", finish_scores, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
         stream, a, parts, is_last);
}

}  // namespace vtp::cuda
