// Attention received by every key, without an attention matrix in memory.
//
// One kernel, key_pass, streams K: a block holds 128 keys of one KV head in registers and meets all
// query rows of the heads that share it, so a pass reads K once. What runs depends on the rows:
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
#include "cuda_ops.h"
#include "vtp/attention_parts.cuh"
#include "vtp/key_tile.cuh"

namespace vtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFewRows = 16;

enum class Pass { statistics, columns };

struct PassArguments {
  AttentionScores a;
  AttentionParts parts;
  int group;                   // query heads of a KV head
  int segments, segment_rows;  // rows that one sum is over, and how many such sums
  float factor;                // of the logits
  bool keys_aligned, queries_aligned;
};

// Where a block works.
struct Block {
  int tile, kv_head;
  int64_t batch;
};

template <class T, int Chunks>
struct PassShared {
  using Keys = KeyTile<T, Chunks>;
  static constexpr int kRows = Chunks <= 8 ? 32 : 16;  // query rows at a time: 8 to 16 KB

  int4 queries[2][kRows * Keys::kUnits];
  RowWeight weights[2][kRows];
  RowStatistic statistics[2][kWarps][kRows];
  BlockScratch<int> scratch;
};

// --- query rows -------------------------------------------------------------------------------

// A tile of query rows: up to kRows of one segment.
template <int Rows>
struct RowTile {
  int first, count;  // among the rows of the KV head

  bool ends_segment;

  VTP_DEVICE RowTile(const PassArguments& p, int step) {
    const int tiles = static_cast<int>(divide_up(p.segment_rows, Rows));
    const int begin = step % tiles * Rows, left = p.segment_rows - begin;
    first = step / tiles * p.segment_rows + begin;
    count = left < Rows ? left : Rows;
    ends_segment = left <= Rows;
  }

  static VTP_DEVICE int steps(const PassArguments& p) {
    return p.segments * static_cast<int>(divide_up(p.segment_rows, Rows));
  }
};

// Starts to copy a tile's queries, and zeros up to the next multiple of kQueries rows.
template <class T, int Chunks>
VTP_DEVICE void stage_queries(const PassArguments& p, const Block& block,
                              const RowTile<PassShared<T, Chunks>::kRows>& rows, int4* out) {
  using Keys = KeyTile<T, Chunks>;
  const auto query = view_as<const T>(p.a.query);
  const int dim = static_cast<int>(query.size[3]), queries = static_cast<int>(query.size[2]);
  const int padded = static_cast<int>(divide_up(rows.count, Keys::kQueries)) * Keys::kQueries;
  for (int i = static_cast<int>(threadIdx.x); i < padded * Keys::kUnits; i += kThreads) {
    const int row = i / Keys::kUnits, unit = i % Keys::kUnits, first = unit * Keys::kUnitSize;
    const int packed = rows.first + (row < rows.count ? row : 0);
    const T* source =
        query.at(block.batch, block.kv_head * p.group + packed / queries, packed % queries);
    const bool exists = row < rows.count && first < dim;
    int4* target = &out[Keys::place(row, unit)];
    if (p.queries_aligned) {
      copy_async(target, source + (exists ? first : 0), exists);
    } else {
      *target = load_unit(source, first, exists ? dim : 0, false);
    }
  }
  commit_copies();
}

// Constants of row `packed` of a KV head; the statistics pass has no use for the softmax.
template <Pass P>
VTP_DEVICE RowWeight load_row_weight(const PassArguments& p, const Block& block, int packed) {
  const int queries = static_cast<int>(p.a.query.size[2]);
  const int head = block.kv_head * p.group + packed / queries, m = packed % queries;
  RowWeight row = {0.0f, 1.0f, last_key(p.a, block.batch, head, m)};
  if (P == Pass::columns && row.last >= 0) {
    if (p.a.lse) {
      row.base = kLog2e * *view_as<const float>(p.a.lse).at(block.batch, head, m);
    } else {
      const int64_t number = static_cast<int64_t>(head) * queries + m;
      const RowSoftmax softmax = p.parts.softmax[block.batch * p.parts.rows + number];
      row.base = softmax.base;
      row.share = softmax.share;
    }
  }
  return row;
}

// --- keys -------------------------------------------------------------------------------------

// By a whole block: the last key any query row attends to.
VTP_DEVICE int farthest_key(const AttentionScores& a, int64_t batch, BlockScratch<int>& scratch) {
  if (!a.query_positions) return static_cast<int>(a.key.size[2]) - 1;
  const int64_t end = a.key.size[2] - 1;
  int farthest = -1;
  for (int64_t m = threadIdx.x; m < a.query_positions.size[1]; m += kThreads) {
    const int64_t position = *a.query_positions.at(batch, m);
    const int64_t last = position < end ? position : end;
    if (last > farthest) farthest = static_cast<int>(last);
  }
  return block_reduce<kThreads>(farthest, Max{}, scratch);
}

// The keys of a lane.
template <int Count>
struct LaneKeys {
  int position[Count];  // INT_MAX: not to be read, beyond every row's last key
  bool wanted[Count];   // a result of this pass is asked for
  int lowest, highest;

  VTP_DEVICE void set(int i, int key, bool is_wanted, int farthest) {
    wanted[i] = is_wanted;
    position[i] = is_wanted && key <= farthest ? key : INT_MAX;
    lowest = i == 0 || position[i] < lowest ? position[i] : lowest;
    highest = i == 0 || position[i] > highest ? position[i] : highest;
  }

  VTP_DEVICE bool any_wanted() const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < Count; ++i) any = any || wanted[i];
    return any;
  }
};

template <Pass P>
VTP_DEVICE bool is_wanted(const AttentionScores& a, int64_t batch, int64_t key) {
  if (P == Pass::columns || a.candidates_only) return is_scored(a, batch, key);
  return key < a.key.size[2] && (!a.valid || *a.valid.at(batch, key));
}

// --- statistics -------------------------------------------------------------------------------

struct NumberMax {
  VTP_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Results over the warp's keys come to lie one column a lane.
template <int Columns>
constexpr int kLanesPerColumn = kWarp / Columns;

// Over all lanes of a query, that is of equal lane % 4: column lane / kLanesPerColumn of x. Lanes
// trade columns, so that each goes on with half of them.
template <int Columns, class Operation>
VTP_DEVICE float reduce_keys(const float (&x)[Columns], Operation operation) {
  static_assert(Columns == 2 || Columns == 4);
  const bool upper = lane_id() & 16;
  float y[Columns / 2];
#pragma unroll
  for (int c = 0; c < Columns / 2; ++c) {
    const float other = __shfl_xor_sync(kAllLanes, upper ? x[c] : x[c + Columns / 2], 16);
    y[c] = operation(upper ? x[c + Columns / 2] : x[c], other);
  }
  float result = y[0];
  if constexpr (Columns == 4) {
    const bool right = lane_id() & 8;
    const float other = __shfl_xor_sync(kAllLanes, right ? y[0] : y[1], 8);
    result = operation(right ? y[1] : y[0], other);
  } else {
    result = operation(result, __shfl_xor_sync(kAllLanes, result, 8));
  }
  return operation(result, __shfl_xor_sync(kAllLanes, result, 4));
}

// The statistic of column lane / kLanesPerColumn over the warp's keys.
template <int Keys, int Columns>
VTP_DEVICE RowStatistic reduce_logits(const float (&logit)[Keys][Columns]) {
  float x[Columns];
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    x[c] = logit[0][c];
#pragma unroll
    for (int i = 1; i < Keys; ++i) x[c] = fmaxf(x[c], logit[i][c]);
  }
  const float maximum = reduce_keys(x, NumberMax{});
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    const int owner = c * kLanesPerColumn<Columns> + lane_id() % 4;
    const float base = finite_base(__shfl_sync(kAllLanes, maximum, owner));
    x[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < Keys; ++i) x[c] += fast_exp2(logit[i][c] - base);
  }
  // All NaN: a maximum of any kind, the sum tells.
  return {maximum == maximum ? maximum : -INFINITY, reduce_keys(x, Sum{})};
}

// --- the pass ---------------------------------------------------------------------------------

// One warp's keys against kQueries rows of the tile in shared memory.
template <class T, int Chunks, Pass P>
struct Warp {
  using Keys = KeyTile<T, Chunks>;
  static constexpr int kColumns = Keys::kColumns;

  const PassArguments& p;
  const Block& block;
  const Keys& keys;
  const LaneKeys<Keys::kKeys>& lane;

  // Which rows attend to which keys, as far as a vote can tell.
  struct Attends {
    int last[kColumns];
    bool any, all;
  };

  VTP_DEVICE Attends attends(const RowWeight* weights) const {
    Attends attends;
    int lowest = INT_MAX, highest = -1;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int last = weights[Keys::query_of(c)].last;
      attends.last[c] = last;
      lowest = last < lowest ? last : lowest;
      highest = last > highest ? last : highest;
    }
    attends.any = __any_sync(kAllLanes, lane.lowest <= highest);
    attends.all = __all_sync(kAllLanes, lane.highest <= lowest);
    return attends;
  }

  // Statistics of the warp's keys into out[kQueries], logits to the workspace.
  VTP_DEVICE void add_statistics(const int4* queries, const RowWeight* weights, int first_row,
                                 int row_count, RowStatistic* out) const {
    const Attends attends = this->attends(weights);
    const int column = lane_id() / kLanesPerColumn<kColumns>;
    const bool owns = lane_id() % kLanesPerColumn<kColumns> < 4;
    RowStatistic statistic = no_logits();
    if (attends.any) {
      const auto products = keys.multiply(queries, static_cast<int>(p.a.query.size[3]));
      float logit[Keys::kKeys][kColumns];
#pragma unroll
      for (int i = 0; i < Keys::kKeys; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) logit[i][c] = products.at(i, c) * p.factor;
      }
      if (p.parts.few_rows) store_logits(logit, first_row, row_count);
      if (!attends.all) {
#pragma unroll
        for (int i = 0; i < Keys::kKeys; ++i) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (lane.position[i] > attends.last[c]) logit[i][c] = -INFINITY;
          }
        }
      }
      statistic = reduce_logits(logit);
    }
    if (owns) out[Keys::query_of(column)] = statistic;
  }

  VTP_DEVICE void store_logits(const float (&logit)[Keys::kKeys][kColumns], int first_row,
                               int row_count) const {
    const int64_t number =
        static_cast<int64_t>(block.kv_head) * p.group * p.a.query.size[2] + first_row;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = Keys::query_of(c);
      float* out = p.parts.logits + (block.batch * p.parts.rows + number + row) * p.parts.stride;
#pragma unroll
      for (int i = 0; i < Keys::kKeys; ++i) {
        const int key = lane.position[i];
        if (row < row_count && key != INT_MAX) out[key] = logit[i][c];
      }
    }
  }

  // Adds the rows' weights to the columns of the lane's keys.
  VTP_DEVICE void add_columns(const int4* queries, const RowWeight* weights,
                              float (&sum)[Keys::kKeys]) const {
    const Attends attends = this->attends(weights);
    if (!attends.any) return;
    const auto products = keys.multiply(queries, static_cast<int>(p.a.query.size[3]));
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const RowWeight row = weights[Keys::query_of(c)];
#pragma unroll
      for (int i = 0; i < Keys::kKeys; ++i) {
        const float weight = fast_exp2(fmaf(products.at(i, c), p.factor, -row.base)) * row.share;
        sum[i] += attends.all || lane.position[i] <= attends.last[c] ? weight : 0.0f;
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

VTP_DEVICE void write_no_statistics(const PassArguments& p, const Block& block) {
  const int64_t rows = p.group * p.a.query.size[2];
  RowStatistic* out =
      p.parts.statistics + (block.batch * p.parts.tiles + block.tile) * p.parts.rows;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    out[block.kv_head * rows + i] = no_logits();
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
  const int kv_heads = static_cast<int>(p.a.key.size[1]);
  const int unit = static_cast<int>(blockIdx.x) / p.parts.tiles;
  const Block block = {static_cast<int>(blockIdx.x) % p.parts.tiles, unit % kv_heads,
                       unit / kv_heads};
  const int first = (block.tile * kWarps + warp_id()) * Keys::kWarpKeys;

  const int farthest = farthest_key(p.a, block.batch, shared.scratch);
  LaneKeys<Keys::kKeys> lane;
#pragma unroll
  for (int i = 0; i < Keys::kKeys; ++i) {
    const int key = first + Keys::key_of(i);
    lane.set(i, key, is_wanted<P>(p.a, block.batch, key), farthest);
  }
  if (!__syncthreads_or(lane.any_wanted())) {
    if (P == Pass::statistics) write_no_statistics(p, block);
    return;
  }

  const auto key = view_as<const T>(p.a.key);
  Keys keys;
  keys.load(key.at(block.batch, block.kv_head), key.stride[2], lane.position,
            static_cast<int>(key.size[3]), p.keys_aligned);

  const Warp<T, Chunks, P> warp = {p, block, keys, lane};
  const int thread = static_cast<int>(threadIdx.x), steps = Rows::steps(p);
  float sum[Keys::kKeys] = {}, column[Keys::kKeys] = {};
  if (steps > 0) {
    const Rows rows(p, 0);
    stage_queries<T, Chunks>(p, block, rows, shared.queries[0]);
    if (thread < Shared::kRows) {
      shared.weights[0][thread] =
          thread < rows.count ? load_row_weight<P>(p, block, rows.first + thread)
                              : RowWeight{0.0f, 0.0f, -1};
    }
  }
  for (int step = 0; step < steps; ++step) {
    const Rows rows(p, step);
    const int buffer = step % 2, other = 1 - buffer;
    wait_copies<0>();
    __syncthreads();  // this tile is here, and the other buffer is free
    RowWeight next = {0.0f, 0.0f, -1};
    if (step + 1 < steps) {
      const Rows next_rows(p, step + 1);
      stage_queries<T, Chunks>(p, block, next_rows, shared.queries[other]);
      if (thread < next_rows.count) {
        next = load_row_weight<P>(p, block, next_rows.first + thread);
      }
    }
    if (P == Pass::statistics && step > 0) {
      write_statistics(p, block, Rows(p, step - 1), shared.statistics[other]);
    }
    for (int n = 0; n < rows.count; n += Keys::kQueries) {
      const int4* queries = shared.queries[buffer] + n * Keys::kUnits;
      const RowWeight* weights = shared.weights[buffer] + n;
      if constexpr (P == Pass::statistics) {
        warp.add_statistics(queries, weights, rows.first + n, rows.count - n,
                            shared.statistics[buffer][warp_id()] + n);
      } else {
        warp.add_columns(queries, weights, sum);
      }
    }
    if (thread < Shared::kRows) shared.weights[other][thread] = next;
    if (P == Pass::columns && rows.ends_segment) {
#pragma unroll
      for (int i = 0; i < Keys::kKeys; ++i) {
        column[i] = larger(column[i], warp_sum<4>(sum[i]));
        sum[i] = 0.0f;
      }
    }
  }
  if constexpr (P == Pass::statistics) {
    if (steps == 0) return;
    __syncthreads();
    write_statistics(p, block, Rows(p, steps - 1), shared.statistics[(steps - 1) % 2]);
  } else {
    float* out = p.parts.columns + (block.batch * kv_heads + block.kv_head) * p.parts.stride;
#pragma unroll
    for (int i = 0; i < Keys::kKeys; ++i) {
      if (lane.wanted[i] && lane_id() % 4 == 0) out[first + Keys::key_of(i)] = column[i];
    }
  }
}

// --- the rest ---------------------------------------------------------------------------------

constexpr int kMergeRows = kWarp, kMergeThreads = kMergeRows * kStatisticParts;
using MergeShared = RowStatistic[kStatisticParts][kMergeRows];

// What merged_softmax does, a thread for each of its parts.
__global__ void __launch_bounds__(kMergeThreads) merge_statistics(const AttentionParts parts) {
  VTP_SHARED(MergeShared, shared);
  const int64_t blocks = divide_up(parts.rows, kMergeRows);
  const int64_t batch = blockIdx.x / blocks, row = blockIdx.x % blocks * kMergeRows + lane_id();
  RowStatistic part = no_logits();
  if (row < parts.rows) {
    const RowStatistic* statistic = parts.statistics + batch * parts.tiles * parts.rows + row;
#pragma unroll 8
    for (int tile = warp_id(); tile < parts.tiles; tile += kStatisticParts) {
      part = merge(part, statistic[tile * parts.rows]);
    }
  }
  shared[warp_id()][lane_id()] = part;
  __syncthreads();
  if (warp_id() > 0 || row >= parts.rows) return;
#pragma unroll
  for (int i = 1; i < kStatisticParts; ++i) part = merge(part, shared[i][lane_id()]);
  parts.softmax[batch * parts.rows + row] = softmax_of(part);
}

struct FinishShared {
  RowWeights weights;
  BlockScratch<int> scratch;
};

// A thread per key.
__global__ void __launch_bounds__(kThreads)
    finish_scores(const AttentionScores a, const AttentionParts parts) {
  VTP_SHARED(FinishShared, shared);
  const int64_t length = a.key.size[2], blocks = divide_up(length, kThreads);
  const int64_t batch = blockIdx.x / blocks;
  const int key = static_cast<int>(blockIdx.x % blocks * kThreads + threadIdx.x);
  const bool scored = is_scored(a, batch, key);
  const float factor = score_factor<kThreads>(a, batch, shared.scratch);
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

template <Pass P>
void launch_pass(const AttentionScores& a, const AttentionParts& parts, Stream stream) {
  const int64_t group = a.query.size[1] / a.key.size[1], rows = a.query.size[2];
  const bool by_head = P == Pass::columns && a.head_reduce == HeadReduce::max;
  PassArguments p;
  p.a = a;
  p.parts = parts;
  p.group = static_cast<int>(group);
  p.segments = by_head ? p.group : 1;
  p.segment_rows = static_cast<int>(by_head ? rows : group * rows);
  p.factor = static_cast<float>(a.scale * kLog2e);
  p.keys_aligned = rows_are_aligned(a.key);
  p.queries_aligned = rows_are_aligned(a.query);
  with_key_tile(a, [&](auto type, auto chunks) {
    launch("attention_scores", key_pass<decltype(type), decltype(chunks)::value, P>,
           dim3(static_cast<unsigned>(parts.tiles * a.key.size[1] * a.query.size[0])),
           dim3(kThreads), 0, stream, p);
  });
}

}  // namespace

AttentionParts attention_parts(const AttentionScores& a, Pieces& workspace) {
  const int64_t batch = a.query.size[0], heads = a.query.size[1], kv_heads = a.key.size[1];
  AttentionParts parts;
  parts.rows = heads * a.query.size[2];
  with_key_tile(a, [&](auto type, auto chunks) {
    constexpr int kKeys = kWarps * KeyTile<decltype(type), decltype(chunks)::value>::kWarpKeys;
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

void compute_attention_parts(const AttentionScores& a, const AttentionParts& parts,
                             Stream stream) {
  if (parts.rows == 0) return;
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
  Pieces pieces(workspace);
  const AttentionParts parts = attention_parts(a, pieces);
  compute_attention_parts(a, parts, stream);
  const int64_t blocks = divide_up(a.key.size[2], kThreads) * a.query.size[0];
  launch("attention_scores", finish_scores, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
         stream, a, parts);
}

}  // namespace vtp::cuda
