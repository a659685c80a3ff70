// What the passes over K of attention_scores leave in the workspace, and how scores are made of it.
// attention_topk finishes with the same functions, so both ops return the same bits.
//
// A row is a pair of query head and query row m, number head * M + m. Logits are in base 2: they
// carry log2(e). The weight of key s in a row is share * 2^(logit - base), for s <= last.
#pragma once

#include "../arguments.h"
#include "math.cuh"
#include "platform.cuh"
#include "warp.cuh"

namespace vtp::cuda {

// Of some logits: the largest and the sum of 2^(logit - maximum). A NaN shows in the sum alone.
struct alignas(8) RowStatistic {
  float maximum, sum;
};

// What to subtract in an exponent: finite where there is no logit but -inf.
VTP_DEVICE float finite_base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

VTP_DEVICE RowStatistic no_logits() { return {-INFINITY, 0.0f}; }

// Of both sets of logits. The fused operation is spelled out: kernels that share this must agree.
VTP_DEVICE RowStatistic merge(const RowStatistic& a, const RowStatistic& b) {
  const float maximum = fmaxf(a.maximum, b.maximum), base = finite_base(maximum);
  const float second = __fmul_rn(b.sum, fast_exp2(b.maximum - base));
  return {maximum, fmaf(a.sum, fast_exp2(a.maximum - base), second)};
}

struct alignas(8) RowSoftmax {
  float base, share;
};

// A sum of 0 is a row that attends to nothing, whose share nobody asks for, or one whose logits are
// all -inf, of which softmax makes NaN.
VTP_DEVICE RowSoftmax softmax_of(const RowStatistic& row) {
  return {finite_base(row.maximum), row.sum == 0.0f ? NAN : 1.0f / row.sum};
}

struct alignas(16) RowWeight {
  float base, share;
  int last;  // the last key the row attends to; -1: none
};

// What decides how far query row m of a head sees, as it lies in memory. It is asked for at once
// and looked at later: a value that is tested where it is loaded holds up the loads behind it.
struct RowSight {
  uint8_t valid;
  float lse;
  int64_t position;

  VTP_DEVICE void load(const AttentionScores& a, int64_t batch, int64_t head, int64_t m) {
    if (a.query_valid) valid = a.query_valid.at(batch, m)->byte;
    if (a.lse) lse = *view_as<const float>(a.lse).at(batch, head, m);
    if (a.query_positions) position = *a.query_positions.at(batch, m);
  }

  // The last key the row attends to; -1 also where the row does not count.
  VTP_DEVICE int last_key(const AttentionScores& a) const {
    if ((a.query_valid && valid == 0) || (a.lse && lse == -INFINITY)) return -1;
    const int64_t end = a.key.size[2] - 1;
    if (!a.query_positions || position > end) return static_cast<int>(end);
    return position < -1 ? -1 : static_cast<int>(position);
  }
};

// The same for a key: whether it gets a score other than 0.
struct KeyMasks {
  uint8_t candidate, valid;

  VTP_DEVICE void load(const AttentionScores& a, int64_t batch, int64_t key) {
    const bool exists = key < a.key.size[2];
    candidate = exists ? a.candidates.at(batch, key)->byte : 0;
    valid = exists && a.valid ? a.valid.at(batch, key)->byte : 1;
  }

  VTP_DEVICE bool is_scored() const { return candidate != 0 && valid != 0; }
};

// NaN wins, as in torch.
VTP_DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

struct AttentionParts {
  bool few_rows = false;  // the result is logits and statistics, else columns
  int64_t rows = 0;    // of a batch entry
  int64_t stride = 0;  // from one row of keys to the next, in logits and columns
  int tiles = 0;       // of keys
  float* logits = nullptr;             // [B, rows, stride], of few rows
  RowStatistic* statistics = nullptr;  // [B, tiles, rows]
  RowSoftmax* softmax = nullptr;       // [B, rows]; absent: to be made of the statistics
  float* columns = nullptr;            // [B, Hkv, stride]: weights, added or reduced over rows
  void *query_copy = nullptr, *key_copy = nullptr;  // aligned, where the rows given are not
};

// Host. Puts on the stream whatever must run before scores can be finished.
AttentionParts attention_parts(const AttentionScores& a, Pieces& workspace);
void compute_attention_parts(const AttentionScores& a, const AttentionParts& parts,
                             OpStream& stream);

constexpr int kStatisticParts = 8;

// part(i) are a row's statistics, merged in this order whoever does it, so that all get the same
// softmax. To merge with no_logits() changes no bit.
template <class Part>
VTP_DEVICE RowSoftmax softmax_of_parts(const Part& part) {
  RowStatistic merged = part(0);
#pragma unroll
  for (int i = 1; i < kStatisticParts; ++i) merged = merge(merged, part(i));
  return softmax_of(merged);
}

constexpr int kStatisticLoads = 8;  // of one thread, under way at once

// The statistics of a row in tiles part, part + 8, ...
VTP_DEVICE RowStatistic merged_part(const AttentionParts& parts, int64_t batch, int64_t row,
                                    int part) {
  const RowStatistic* statistic = parts.statistics + batch * parts.tiles * parts.rows + row;
  RowStatistic merged = no_logits();
  for (int tile = part; tile < parts.tiles; tile += kStatisticLoads * kStatisticParts) {
    RowStatistic read[kStatisticLoads];
#pragma unroll
    for (int i = 0; i < kStatisticLoads; ++i) {
      const int64_t at = tile + i * kStatisticParts;
      read[i] = no_logits();
      if (at < parts.tiles) read[i] = statistic[at * parts.rows];
    }
#pragma unroll
    for (int i = 0; i < kStatisticLoads; ++i) merged = merge(merged, read[i]);
  }
  return merged;
}

// A row's softmax as it lies in memory: ready, or the statistics of no more than 8 tiles, each a
// part of its own.
struct RawSoftmax {
  RowSoftmax softmax;
  RowStatistic part[kStatisticParts];

  // Nothing but loads, so that they overlap.
  VTP_DEVICE void load(const AttentionParts& parts, int64_t batch, int64_t row) {
    if (parts.softmax) {
      softmax = parts.softmax[batch * parts.rows + row];
      return;
    }
    const RowStatistic* statistic = parts.statistics + batch * parts.tiles * parts.rows + row;
#pragma unroll
    for (int i = 0; i < kStatisticParts; ++i) {
      part[i] = no_logits();
      if (i < parts.tiles) part[i] = statistic[i * parts.rows];
    }
  }

  VTP_DEVICE RowSoftmax value(const AttentionParts& parts) const {
    if (parts.softmax) return softmax;
    return softmax_of_parts([&](int i) { return part[i]; });
  }
};

constexpr int kWeightRows = 512;  // of which the constants fit into shared memory at a time
using RowWeights = RowWeight[kWeightRows];

// By a whole block of Threads, barriers left to the caller: constants of rows from `first` on.
template <int Threads>
VTP_DEVICE void load_row_weights(const AttentionScores& a, const AttentionParts& parts,
                                 int64_t batch, int64_t first, RowWeights& weights) {
  const auto queries = static_cast<unsigned>(a.query.size[2]);
  for (int i = static_cast<int>(threadIdx.x); i < kWeightRows; i += Threads) {
    const int64_t row = first + i;
    if (row >= parts.rows) break;
    const auto number = static_cast<unsigned>(row);
    RawSoftmax raw;
    raw.load(parts, batch, row);
    RowSight sight;
    sight.load(a, batch, number / queries, number % queries);
    const RowSoftmax softmax = raw.value(parts);
    weights[i] = {softmax.base, softmax.share, sight.last_key(a)};
  }
}

// The same where there are more tiles than one thread takes, a thread for each part of a row.
template <int Threads>
struct MergeScratch {
  static constexpr int kRows = Threads / kStatisticParts;  // at a time

  RowStatistic part[kStatisticParts][kRows];
};

template <int Threads>
VTP_DEVICE void merge_row_weights(const AttentionScores& a, const AttentionParts& parts,
                                  int64_t batch, MergeScratch<Threads>& scratch,
                                  RowWeights& weights) {
  constexpr int kRows = MergeScratch<Threads>::kRows;
  const auto queries = static_cast<unsigned>(a.query.size[2]);
  const int thread = static_cast<int>(threadIdx.x), rows = static_cast<int>(parts.rows);
  for (int first = 0; first < rows; first += kRows) {
    const int row = first + thread % kRows, part = thread / kRows;
    RowSight sight;
    if (row < rows) {
      if (part == 0) sight.load(a, batch, row / queries, row % queries);
      scratch.part[part][row - first] = merged_part(parts, batch, row, part);
    }
    __syncthreads();
    if (part == 0 && row < rows) {
      const RowSoftmax softmax =
          softmax_of_parts([&](int i) { return scratch.part[i][row - first]; });
      weights[row] = {softmax.base, softmax.share, sight.last_key(a)};
    }
    __syncthreads();
  }
}

// Adds up a key's weights, row by row, and reduces over heads on the way.
class HeadTotal {
 public:
  // A maximum needs every head's sum; for sum and mean the rows of all heads may be added at once.
  VTP_DEVICE explicit HeadTotal(const AttentionScores& a)
      : is_max_(a.head_reduce == HeadReduce::max),
        head_rows_(is_max_ ? static_cast<int>(a.query.size[2]) : 1) {}

  VTP_DEVICE void add(float weight) {
    head_ += weight;
    if (++row_ < head_rows_) return;
    total_ = is_max_ ? larger(total_, head_) : total_ + head_;
    head_ = 0.0f;
    row_ = 0;
  }

  VTP_DEVICE float total() const { return total_; }

 private:
  bool is_max_;
  int head_rows_, row_ = 0;
  float head_ = 0.0f, total_ = 0.0f;  // weights are never below 0
};

constexpr int kLoadsAtOnce = 16;  // of one thread, to cover the latency of memory

// The weights of a key in `count` rows from `first` on, whose constants are at hand.
VTP_DEVICE void add_rows(const AttentionParts& parts, int64_t batch, int64_t first, int count,
                         const RowWeights& weights, int key, HeadTotal& total) {
  const float* logits = parts.logits + (batch * parts.rows + first) * parts.stride + key;
  for (int begin = 0; begin < count; begin += kLoadsAtOnce) {
    float logit[kLoadsAtOnce];
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      const int row = begin + i;
      const bool attends = row < count && key <= weights[row].last;
      logit[i] = attends ? logits[row * parts.stride] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      if (begin + i >= count) break;
      const RowWeight row = weights[begin + i];
      const float weight = __fmul_rn(fast_exp2(logit[i] - row.base), row.share);
      total.add(key <= row.last ? weight : 0.0f);
    }
  }
}

// The same of the columns of all KV heads.
VTP_DEVICE float reduce_columns(const AttentionScores& a, const AttentionParts& parts,
                                int64_t batch, int key) {
  const int heads = static_cast<int>(a.key.size[1]);
  const float* columns = parts.columns + batch * heads * parts.stride + key;
  float total = 0.0f;
  for (int begin = 0; begin < heads; begin += kLoadsAtOnce) {
    float column[kLoadsAtOnce];
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      column[i] = begin + i < heads ? columns[(begin + i) * parts.stride] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoadsAtOnce; ++i) {
      total = a.head_reduce == HeadReduce::max ? larger(total, column[i]) : total + column[i];
    }
  }
  return total;
}

// The score of a key that gets one, where all rows' constants are at hand, at most kWeightRows.
VTP_DEVICE float finished_score(const AttentionScores& a, const AttentionParts& parts,
                                int64_t batch, int key, const RowWeights& weights, float factor) {
  if (!parts.few_rows) return reduce_columns(a, parts, batch, key) * factor;
  HeadTotal sum(a);
  add_rows(parts, batch, 0, static_cast<int>(parts.rows), weights, key, sum);
  return sum.total() * factor;
}

// By a whole block: what makes a mean of a sum over rows, and of one over heads.
template <int Threads>
VTP_DEVICE float score_factor(const AttentionScores& a, int64_t batch, BlockScratch<int>& scratch) {
  int count = static_cast<int>(a.query.size[2]);
  if (a.query_valid) {
    int mine = 0;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += Threads) {
      mine += *a.query_valid.at(batch, m);
    }
    count = block_reduce<Threads>(mine, Sum{}, scratch);
  }
  const float rows = static_cast<float>(count > 1 ? count : 1);
  const bool mean = a.head_reduce == HeadReduce::mean;
  return 1.0f / (mean ? rows * static_cast<float>(a.query.size[1]) : rows);
}

}  // namespace vtp::cuda
