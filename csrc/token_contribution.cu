// What each token adds to the attention output of one row, in closed form: with o the output and
// c_j = concat_h a[h,j] v[h,j],
//   alpha_j = <o, c_j> = sum_h a[h,j] <o_h, v[h,j]>
//   beta_j = ||c_j||^2 = sum_h a[h,j]^2 ||v[h,j]||^2
//   cos(o - c_j, o) = (||o||^2 - alpha_j) / (||o|| sqrt(||o||^2 - 2 alpha_j + beta_j))
//
//   attend    a split of the keys each block: logits, and the output as far as these keys make it
//   combine   a query head each block: maximum and sum of its softmax, its output
//   compare   a few tokens each block, all heads: V once more, alpha and beta, cosine and norm
//
// K is read once and V twice. Sums over heads are taken in double, the cosines of interest lie
// within 1e-3 of 1; the dot products below them are float32. Splits and orders of summation depend
// on the shapes alone, and not on the batch.
#include <algorithm>
#include <cmath>

#include "cuda_ops.h"
#include "vtp/async_copy.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/math.cuh"
#include "vtp/row_dot.cuh"

namespace vtp::cuda {
namespace {

constexpr int kGroups = 16;    // groups of lanes a block, so 128, 256 or 512 threads
constexpr int kGroupKeys = 8;  // keys that a group holds in registers in `attend`
constexpr int kSplit = kGroups * kGroupKeys;
constexpr int kLogGroupTokens = 2;  // the same in `compare`, which has more blocks for it
constexpr int kGroupTokens = 1 << kLogGroupTokens;
constexpr int kMaxThreads = kGroups * kWarp;
constexpr int kMaxWarps = kGroups;
// Query heads that share one read of K and V; more of them go to blocks of their own.
constexpr int kMaxHeads = 8;
// What `compare` keeps of query heads in shared memory: 60 heads of head dim 128 at a time.
constexpr int kCompareBytes = 32 * 1024;

struct Shape {
  int length, heads, kv_heads, group;
  int chunks;          // parts of a group, of up to kMaxHeads query heads
  int splits;          // parts of the keys
  int tiles;           // of tokens, in `compare`
  int log_head_warps;  // warps of `compare` that share the KV heads of the same tokens
  int compare_heads;   // query heads that `compare` takes at a time
  float factor;        // of query, so that exponentials are those of base 2
  RowShape row;

  explicit Shape(const TokenContribution& a)
      : length(static_cast<int>(a.key.size[2])),
        heads(static_cast<int>(a.query.size[1])),
        kv_heads(static_cast<int>(a.key.size[1])),
        group(heads / kv_heads),
        chunks(static_cast<int>(divide_up(group, kMaxHeads))),
        splits(static_cast<int>(divide_up(length, kSplit))),
        log_head_warps(0),
        factor(static_cast<float>(a.scale * 1.4426950408889634)),
        row(RowShape::of(a.query.size[2])) {
    while (2 << log_head_warps <= std::min(kv_heads, warps())) ++log_head_warps;
    tiles = static_cast<int>(divide_up(length, tile_tokens()));
    compare_heads = std::min(heads, std::max(1, kCompareBytes / compare_head_bytes()));
  }

  VTP_INLINE int threads() const { return kGroups << row.log_lanes; }
  VTP_INLINE int warps() const { return threads() / kWarp; }
  VTP_INLINE int head_warps() const { return 1 << log_head_warps; }
  VTP_INLINE int log_warp_tokens() const { return kLogGroupTokens + 5 - row.log_lanes; }
  VTP_INLINE int log_tile_tokens() const {
    return row.log_lanes - 1 - log_head_warps + log_warp_tokens();
  }
  VTP_INLINE int tile_tokens() const { return 1 << log_tile_tokens(); }
  VTP_INLINE int compare_head_bytes() const {  // an output and the tile's weights
    return (row.width() + tile_tokens()) * static_cast<int>(sizeof(float));
  }
};

// Softmax is taken in base 2, of logits that carry a factor of log2(e). Vectors lie in the order of
// registers, see row_dot.cuh.
struct Workspace {
  float* logits;                     // [B, Hq, S], -inf where not valid
  float *split_maximum, *split_sum;  // [B, Hq, splits]
  float* split_output;               // [B, Hq, splits, width], relative to the split's maximum
  float *maximum, *inverse_sum;      // [B, Hq]
  float* output;                     // [B, Hq, width]
  double* squared;                   // [B, Hq], ||o_h||^2
};

Workspace take_workspace(const TokenContribution& a, Pieces& pieces) {
  const Shape shape(a);
  const int64_t rows = a.query.size[0] * shape.heads, width = shape.row.width();
  Workspace work;
  work.logits = pieces.take<float>(rows * shape.length);
  work.split_maximum = pieces.take<float>(rows * shape.splits);
  work.split_sum = pieces.take<float>(rows * shape.splits);
  work.split_output = pieces.take<float>(rows * shape.splits * width);
  work.maximum = pieces.take<float>(rows);
  work.inverse_sum = pieces.take<float>(rows);
  work.output = pieces.take<float>(rows * width);
  work.squared = pieces.take<double>(rows);
  return work;
}

// What exponents are taken relative to: 0 where every logit is -inf, so that all weights are 0.
VTP_DEVICE float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// ---- attend ------------------------------------------------------------------------------------

// Shared memory of a block for `heads` query heads.
struct AttendShared {
  float* queries;  // [heads, width], scaled
  float* weights;  // [heads, kSplit]: logits, then exponentials
  float* sums;     // [2, warps, width]

  static size_t bytes(const Shape& shape) {
    const int width = shape.row.width(), heads = std::min(shape.group, kMaxHeads);
    return (heads * (width + kSplit) + 2 * shape.warps() * width) * sizeof(float);
  }

  VTP_DEVICE AttendShared(void* memory, const Shape& shape, int heads)
      : queries(static_cast<float*>(memory)),
        weights(queries + heads * shape.row.width()),
        sums(weights + heads * kSplit) {}
};

// `count` queries into shared memory, padded with zeros.
template <class T>
VTP_DEVICE void stage_queries(const TokenContribution& a, const Shape& shape, int b, int first,
                              int count, float* queries) {
  const int width = shape.row.width(), log_width = shape.row.log_width();
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += shape.threads()) {
    const int head = i >> log_width, column = shape.row.column_at<T>(i & (width - 1));
    const T* query = view_as<const T>(a.query).at(b, first + head);
    queries[i] = column < shape.row.dim ? to_float(query[column]) * shape.factor : 0.0f;
  }
}

// One head's logits become exponentials, one warp does it.
VTP_DEVICE void exponentiate(const Shape& shape, int split, int64_t row, const Workspace& work,
                             float* weights) {
  constexpr int kOwn = kSplit / kWarp;
  float x[kOwn], maximum = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    x[i] = weights[i * kWarp + lane_id()];
    maximum = Max{}(maximum, x[i]);
    const int key = split * kSplit + i * kWarp + lane_id();
    if (key < shape.length) work.logits[row * shape.length + key] = x[i];
  }
  maximum = warp_max(maximum);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    x[i] = fast_exp2(x[i] - base_of(maximum));
    weights[i * kWarp + lane_id()] = x[i];
    sum += x[i];
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) {
    work.split_maximum[row * shape.splits + split] = maximum;
    work.split_sum[row * shape.splits + split] = sum;
  }
}

// A block's threads up to `width`: the sum of what its warps stored at this thread's place.
VTP_DEVICE float sum_warps(const float* sums, const Shape& shape) {
  float sum = 0.0f;
  for (int warp = 0; warp < shape.warps(); ++warp) {
    sum += sums[warp * shape.row.width() + static_cast<int>(threadIdx.x)];
  }
  return sum;
}

// Whether keys and values of a split fit into registers side by side, and are asked for together.
template <class T, bool Aligned>
constexpr bool kValuesAtOnce = Aligned && sizeof(T) == 2;

template <class T, bool Aligned>
__global__ void __launch_bounds__(kMaxThreads)
    attend(TokenContribution a, Shape shape, Workspace work) {
  // Parts of a group are neighbours: they read the same keys.
  const unsigned units = blockIdx.x / shape.chunks, pairs = units / shape.splits;
  const int chunk = blockIdx.x % shape.chunks, split = units % shape.splits;
  const int kv_head = pairs % shape.kv_heads, b = pairs / shape.kv_heads;
  const int first_head = kv_head * shape.group + chunk * kMaxHeads;
  const int count = min(kMaxHeads, shape.group - chunk * kMaxHeads);
  const int64_t row = static_cast<int64_t>(b) * shape.heads + first_head;

  VTP_DYNAMIC_SHARED(memory);
  const AttendShared shared(memory, shape, count);
  release_next_kernel();
  const RowShape& row_shape = shape.row;

  // The keys of this thread's group, and the one that it will hold products of.
  const int group_key = row_shape.group() * kGroupKeys, first_key = split * kSplit + group_key;
  const int own_key = row_shape.lane() % kGroupKeys;
  const bool own_valid =
      first_key + own_key < shape.length && (!a.valid || *a.valid.at(b, first_key + own_key));
  const unsigned valid =
      __ballot_sync(kAllLanes, own_valid) >> (row_shape.group_of_warp() << row_shape.log_lanes);

  RowPart<T> keys[kGroupKeys], values[kGroupKeys];
  const auto key = view_as<const T>(a.key), value = view_as<const T>(a.value);
  const auto load_values = [&] {
    load_parts<Aligned>(value.at(b, kv_head, first_key), value.stride[2], row_shape, valid, values);
  };
  load_parts<Aligned, true>(key.at(b, kv_head, first_key), key.stride[2], row_shape, valid, keys);
  if (kValuesAtOnce<T, Aligned>) load_values();
  stage_queries<T>(a, shape, b, first_head, count, shared.queries);
  __syncthreads();

  float rows[kGroupKeys][kLaneElements];
  widen_parts(keys, rows);
#pragma unroll 1
  for (int head = 0; head < count; ++head) {
    float query[kLaneElements];
    load_share(shared.queries + head * row_shape.width(), row_shape, query);
    const float logit = dot_rows(rows, query, row_shape);
    if (row_shape.lane() < kGroupKeys) {
      shared.weights[head * kSplit + group_key + own_key] = own_valid ? logit : -INFINITY;
    }
  }

  if (!kValuesAtOnce<T, Aligned>) load_values();  // under way while exponentials are taken
  __syncthreads();
  for (int head = warp_id(); head < count; head += shape.warps()) {
    exponentiate(shape, split, row + head, work, shared.weights + head * kSplit);
  }
  __syncthreads();

  widen_parts(values, rows);
  const int width = row_shape.width();
#pragma unroll 1
  for (int head = 0; head < count; ++head) {
    float sum[kLaneElements] = {};
    add_rows(rows, shared.weights + head * kSplit + group_key, sum);
    sum_groups(sum, row_shape);
    // Two places by turns: while this head is added up, the next one's sums are stored.
    float* sums = shared.sums + head % 2 * shape.warps() * width;
    if (row_shape.group_of_warp() == 0) {
      store_share(sum, row_shape, sums + warp_id() * width);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) {
      work.split_output[((row + head) * shape.splits + split) * width + threadIdx.x] =
          sum_warps(sums, shape);
    }
  }
}

// ---- combine -----------------------------------------------------------------------------------

constexpr int kCombineThreads = 256;

struct CombineShared {
  float4 outputs[kCombineThreads];
  float sums[kCombineThreads];
  BlockScratch<float> maximum;
  BlockScratch<double> squared;
};

// Every thread takes four columns of some of the splits.
__global__ void __launch_bounds__(kCombineThreads) combine(Shape shape, Workspace work) {
  VTP_SHARED(CombineShared, shared);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), width = shape.row.width();
  const int quads = width / 4, slices = kCombineThreads / quads;
  const int quad = thread % quads, slice = thread / quads;
  const float* maxima = work.split_maximum + row * shape.splits;
  const float* split_sums = work.split_sum + row * shape.splits;
  const auto* outputs =
      reinterpret_cast<const float4*>(work.split_output) + row * shape.splits * quads + quad;
  release_next_kernel();
  await_earlier_kernels();

  float maximum = -INFINITY;
  for (int split = thread; split < shape.splits; split += kCombineThreads) {
    maximum = Max{}(maximum, maxima[split]);
  }
  maximum = block_reduce<kCombineThreads>(maximum, Max{}, shared.maximum);

  float4 output = {0.0f, 0.0f, 0.0f, 0.0f};
  float sum = 0.0f;
#pragma unroll 4
  for (int split = slice; split < shape.splits; split += slices) {
    const float factor = fast_exp2(maxima[split] - base_of(maximum));
    const float4 part = outputs[static_cast<int64_t>(split) * quads];
    output = {fmaf(part.x, factor, output.x), fmaf(part.y, factor, output.y),
              fmaf(part.z, factor, output.z), fmaf(part.w, factor, output.w)};
    sum = fmaf(split_sums[split], factor, sum);
  }
  shared.outputs[thread] = output;
  shared.sums[thread] = sum;
  __syncthreads();

  double squared = 0.0;
  if (thread < width) {
    float x = 0.0f;
    sum = 0.0f;
    for (int i = 0; i < slices; ++i) {
      x += reinterpret_cast<const float*>(shared.outputs + i * quads)[thread];
      sum += shared.sums[i * quads];
    }
    const float inverse_sum = 1.0f / sum;
    x *= inverse_sum;
    work.output[row * width + thread] = x;
    squared = static_cast<double>(x) * x;
    if (thread == 0) {
      work.maximum[row] = maximum;
      work.inverse_sum[row] = inverse_sum;
    }
  }
  squared = block_reduce<kCombineThreads>(squared, Sum{}, shared.squared);
  if (thread == 0) work.squared[row] = squared;
}

// ---- compare -----------------------------------------------------------------------------------

struct CompareShared {
  double alpha[kMaxWarps][kWarp / 2], beta[kMaxWarps][kWarp / 2];
  double squared;  // ||o||^2
  bool is_nearly_all[kMaxWarps * kWarp / 2];
  // of add_rest
  alignas(16) float weights[kSplit];  // read four at a time
  double rest_squared[kMaxWarps], rest_dot_output[kMaxWarps];
};

// What a key's weight in a query head is made of, so that it can be on its way before it is needed.
struct Weight {
  float logit = 0.0f, maximum = 0.0f, inverse_sum = 0.0f;

  VTP_DEVICE void load(const Workspace& work, const Shape& shape, int64_t row, int key) {
    logit = work.logits[row * shape.length + key];
    maximum = work.maximum[row];
    inverse_sum = work.inverse_sum[row];
  }

  VTP_DEVICE float value() const { return fast_exp2(logit - base_of(maximum)) * inverse_sum; }
};

// Shared memory for the query heads that `compare` takes at a time.
struct CompareHeads {
  float* outputs;  // [compare_heads, width]
  float* weights;  // [compare_heads, tile_tokens]

  VTP_DEVICE CompareHeads(void* memory, const Shape& shape)
      : outputs(static_cast<float*>(memory)),
        weights(outputs + shape.compare_heads * shape.row.width()) {}
};

// Weights of the tile's tokens in `count` query heads, a few a thread: asked for, then stored.
struct TileWeights {
  static constexpr int kAtOnce = 2;
  Weight weight[kAtOnce];

  VTP_DEVICE void load(const Shape& shape, const Workspace& work, int64_t row, int count, int first,
                       int begin) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = begin + i * shape.threads() + static_cast<int>(threadIdx.x);
      const int token = first + (at & (shape.tile_tokens() - 1));
      weight[i] = {-INFINITY, 0.0f, 0.0f};
      if (at < count << shape.log_tile_tokens() && token < shape.length) {
        weight[i].load(work, shape, row + (at >> shape.log_tile_tokens()), token);
      }
    }
  }

  VTP_DEVICE void store(const Shape& shape, int count, int begin, float* weights) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = begin + i * shape.threads() + static_cast<int>(threadIdx.x);
      if (at < count << shape.log_tile_tokens()) weights[at] = weight[i].value();
    }
  }
};

// How many KV heads ahead of their use a warp's values are asked for: 32 registers.
template <class T, bool Aligned>
constexpr int kHeadsAhead = !Aligned ? 1 : 4 / static_cast<int>(sizeof(T));

// Of this thread's token, from the KV heads of its warp. All lanes of a group learn a token's
// product. They take the double arithmetic, slow on most devices, in turns: as many query heads at
// once as there are lanes to a token.
class AlphaBeta {
 public:
  VTP_DEVICE void add(RowShape row, float weight, float product, float value_squared) {
    if (turn(row) == pending_) {
      weight_ = weight;
      product_ = product;
      value_squared_ = value_squared;
    }
    if (++pending_ == row.lanes() / kGroupTokens) finish_turns(row);
  }

  VTP_DEVICE void finish_turns(RowShape row) {
    const double wide = turn(row) < pending_ ? weight_ : 0.0f;
    alpha_ += wide * product_;
    beta_ += wide * wide * value_squared_;
    pending_ = 0;
  }

  // Over the lanes that took turns.
  VTP_DEVICE void sum_turns(RowShape row) {
#pragma unroll
    for (int offset = kGroupTokens; offset < kWarp; offset *= 2) {
      if (offset < row.lanes()) {
        alpha_ += __shfl_xor_sync(kAllLanes, alpha_, offset);
        beta_ += __shfl_xor_sync(kAllLanes, beta_, offset);
      }
    }
  }

  VTP_DEVICE double alpha() const { return alpha_; }
  VTP_DEVICE double beta() const { return beta_; }

 private:
  static VTP_DEVICE int turn(RowShape row) { return row.lane() / kGroupTokens; }

  int pending_ = 0;
  float weight_ = 0.0f, product_ = 0.0f, value_squared_ = 0.0f;
  double alpha_ = 0.0, beta_ = 0.0;
};

// `first` is the tile's first token, `place` that of this thread in it. All of a block come. Leaves
// ||o||^2, too.
template <class T, bool Aligned>
VTP_DEVICE AlphaBeta compare_heads(const TokenContribution& a, const Shape& shape,
                                   const Workspace& work, int b, int first, int place,
                                   bool own_wanted, void* memory, CompareShared& shared) {
  constexpr int kAhead = kHeadsAhead<T, Aligned>;
  const RowShape row_shape = shape.row;
  const CompareHeads heads(memory, shape);
  const int first_token = first + place - row_shape.lane() % kGroupTokens;
  const auto value = view_as<const T>(a.value);
  const unsigned of_warp = __ballot_sync(kAllLanes, own_wanted);
  const unsigned wanted = of_warp >> (row_shape.group_of_warp() << row_shape.log_lanes);
  AlphaBeta sums;
#pragma unroll 1
  for (int begin = 0; begin < shape.heads; begin += shape.compare_heads) {
    const int count = min(shape.compare_heads, shape.heads - begin);
    const int last = (begin + count - 1) / shape.group, step = shape.head_warps();
    int kv_head = begin / shape.group;
    kv_head += (warp_id() - kv_head) & (step - 1);
    RowPart<T> parts[kAhead][kGroupTokens];
    const auto load = [&](int head, auto& out) {
      load_parts<Aligned>(value.at(b, min(head, last), first_token), value.stride[2], row_shape,
                          head <= last ? wanted : 0, out);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(kv_head + i * step, parts[i]);

    const int64_t row = static_cast<int64_t>(b) * shape.heads + begin;
    double squared = 0.0;
    if (begin == 0) {
      await_earlier_kernels();  // values are no kernel's
      if (warp_id() == 0 && lane_id() < shape.heads) squared = work.squared[row + lane_id()];
    } else {
      __syncthreads();  // the heads before are no longer read
    }
    const float* outputs = work.output + row * row_shape.width();
    for (int i = static_cast<int>(threadIdx.x) * 4; i < count * row_shape.width();
         i += shape.threads() * 4) {
      copy_async(heads.outputs + i, outputs + i, true);
    }
    commit_copies();
    TileWeights weights;
    weights.load(shape, work, row, count, first, 0);
    weights.store(shape, count, 0, heads.weights);
    constexpr int kAtOnce = TileWeights::kAtOnce;
    for (int i = kAtOnce * shape.threads(); i < count << shape.log_tile_tokens();
         i += kAtOnce * shape.threads()) {
      weights.load(shape, work, row, count, first, i);
      weights.store(shape, count, i, heads.weights);
    }
    if (begin == 0 && warp_id() == 0) {
      for (int head = lane_id() + kWarp; head < shape.heads; head += kWarp) {
        squared += work.squared[row + head];
      }
      squared = warp_sum(squared);
      if (lane_id() == 0) shared.squared = squared;
    }
    wait_copies<0>();
    __syncthreads();
    if (of_warp == 0) continue;

#pragma unroll 1
    for (; kv_head <= last; kv_head += kAhead * step) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int head = kv_head + i * step;
        if (head > last) break;
        float rows[kGroupTokens][kLaneElements];
        widen_parts(parts[i], rows);
        load(head + kAhead * step, parts[i]);
        const float value_squared = square_rows(rows, row_shape);
        const int end = min((head + 1) * shape.group - begin, count);
#pragma unroll 1
        for (int query = max(head * shape.group - begin, 0); query < end; ++query) {
          float output[kLaneElements];
          load_share(heads.outputs + query * row_shape.width(), row_shape, output);
          const float weight = heads.weights[(query << shape.log_tile_tokens()) + place];
          sums.add(row_shape, weight, dot_rows(rows, output, row_shape), value_squared);
        }
      }
    }
  }
  sums.finish_turns(row_shape);
  sums.sum_turns(row_shape);
  return sums;
}

// This thread's part of the output of head `row` without `token`: from the other splits, which know
// nothing of it, and from the keys of its own split, once more.
template <class T, bool Aligned>
VTP_DEVICE float rest_of_head(const TokenContribution& a, const Shape& shape, const Workspace& work,
                              int b, int head, int token, float* sums, CompareShared& shared) {
  const int64_t row = static_cast<int64_t>(b) * shape.heads + head;
  const int split = token / kSplit, thread = static_cast<int>(threadIdx.x);
  const int width = shape.row.width();
  if (thread < kSplit) {
    const int key = split * kSplit + thread;
    Weight weight;
    const bool counts = key < shape.length && key != token;
    if (counts) weight.load(work, shape, row, key);
    shared.weights[thread] = counts ? weight.value() : 0.0f;
  }
  __syncthreads();
  float sum[kLaneElements] = {};
#pragma unroll 1
  for (int part = 0; part < kGroupKeys / kGroupTokens; ++part) {
    const int group_key = shape.row.group() * kGroupKeys + part * kGroupTokens;
    const auto value = view_as<const T>(a.value);
    unsigned wanted = 0;  // neither padding, of any content, nor past the end
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      wanted |= static_cast<unsigned>(shared.weights[group_key + i] != 0.0f) << i;
    }
    RowPart<T> parts[kGroupTokens];
    load_parts<Aligned>(value.at(b, head / shape.group, split * kSplit + group_key),
                        value.stride[2], shape.row, wanted, parts);
    float rows[kGroupTokens][kLaneElements];
    widen_parts(parts, rows);
    add_rows(rows, shared.weights + group_key, sum);
  }
  sum_groups(sum, shape.row);
  if (shape.row.group_of_warp() == 0) store_share(sum, shape.row, sums + warp_id() * width);
  __syncthreads();
  if (thread >= width) return 0.0f;
  float rest = sum_warps(sums, shape);
  const float *maxima = work.split_maximum + row * shape.splits, base = base_of(work.maximum[row]);
  for (int other = 0; other < shape.splits; ++other) {
    if (other == split) continue;
    const float factor = fast_exp2(maxima[other] - base) * work.inverse_sum[row];
    rest = fmaf(work.split_output[(row * shape.splits + other) * width + thread], factor, rest);
  }
  return rest;
}

struct Rest {
  double squared, dot_output;
};

// ||o - c_j||^2 and <o - c_j, o> from the other tokens' contributions, by all threads of a block.
template <class T, bool Aligned>
VTP_DEVICE Rest add_rest(const TokenContribution& a, const Shape& shape, const Workspace& work,
                         int b, int token, float* sums, CompareShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), width = shape.row.width();
  double squared = 0.0, dot_output = 0.0;
  for (int head = 0; head < shape.heads; ++head) {
    const double rest = rest_of_head<T, Aligned>(a, shape, work, b, head, token, sums, shared);
    if (thread < width) {
      const int64_t row = static_cast<int64_t>(b) * shape.heads + head;
      squared += rest * rest;
      dot_output += rest * work.output[row * width + thread];
    }
  }
  squared = warp_sum(squared);
  dot_output = warp_sum(dot_output);
  if (lane_id() == 0) {
    shared.rest_squared[warp_id()] = squared;
    shared.rest_dot_output[warp_id()] = dot_output;
  }
  __syncthreads();
  Rest all = {0.0, 0.0};
  for (int warp = 0; warp < shape.warps(); ++warp) {
    all.squared += shared.rest_squared[warp];
    all.dot_output += shared.rest_dot_output[warp];
  }
  __syncthreads();
  return all;
}

VTP_DEVICE float cosine_of(double squared, const Rest& rest) {
  const double scale = sqrt(rest.squared) * sqrt(squared);
  return scale == 0.0 ? 0.0f : static_cast<float>(rest.dot_output / scale);
}

VTP_DEVICE bool is_wanted(const TokenContribution& a, const Shape& shape, int b, int token) {
  if (token >= shape.length) return false;
  const bool is_candidate = *a.candidates.at(b, token);
  const bool is_valid = !a.valid || *a.valid.at(b, token);
  return is_candidate & is_valid;  // both loads at once
}

// This thread's token of the tile, from the sums of all warps. True where its rest is too short for
// the closed form.
VTP_DEVICE bool finish(const TokenContribution& a, const Shape& shape, int b, int first,
                       const CompareShared& shared) {
  const int place = static_cast<int>(threadIdx.x), token = first + place;
  if (place >= shape.tile_tokens() || token >= shape.length) return false;
  const int warp = place >> shape.log_warp_tokens() << shape.log_head_warps;
  const int warp_place = place & ((1 << shape.log_warp_tokens()) - 1);
  double alpha = 0.0, beta = 0.0;
  for (int i = 0; i < shape.head_warps(); ++i) {
    alpha += shared.alpha[warp + i][warp_place];
    beta += shared.beta[warp + i][warp_place];
  }
  // No contribution: cosine 1. So it is off the candidates, too.
  const bool contributes = is_wanted(a, shape, b, token) && beta != 0.0;
  const double squared = shared.squared;
  const Rest rest = {squared - 2.0 * alpha + beta, squared - alpha};
  const int64_t at = static_cast<int64_t>(b) * shape.length + token;
  static_cast<float*>(a.cosine)[at] = contributes ? cosine_of(squared, rest) : 1.0f;
  static_cast<float*>(a.norm)[at] = contributes ? static_cast<float>(sqrt(beta)) : 0.0f;
  // The closed form subtracts numbers as large as ||o||^2: where less than 0.1 % of that is left, a
  // token that is nearly all of the output, the rest is added up instead.
  return contributes && rest.squared < 1e-3 * squared;
}

template <class T, bool Aligned>
__global__ void __launch_bounds__(kMaxThreads)
    compare(TokenContribution a, Shape shape, Workspace work) {
  VTP_SHARED(CompareShared, shared);
  VTP_DYNAMIC_SHARED(memory);
  // From the end: what `attend` read last is likeliest to be in the cache yet.
  const unsigned unit = gridDim.x - 1 - blockIdx.x;
  const int b = unit / shape.tiles, first = unit % shape.tiles * shape.tile_tokens();
  const int warp_place = shape.row.group_of_warp() * kGroupTokens + shape.row.lane() % kGroupTokens;
  const int warp_first = warp_id() >> shape.log_head_warps << shape.log_warp_tokens();
  const int place = warp_first + warp_place;
  const bool own_wanted = is_wanted(a, shape, b, first + place);
  const AlphaBeta sums = compare_heads<T, Aligned>(a, shape, work, b, first, place, own_wanted,
                                                   memory, shared);
  await_earlier_kernels();  // so that every path has, for all that the machine code tells
  if (shape.row.lane() < kGroupTokens) {
    shared.alpha[warp_id()][warp_place] = sums.alpha();
    shared.beta[warp_id()][warp_place] = sums.beta();
  }
  __syncthreads();

  const bool is_nearly_all = finish(a, shape, b, first, shared);
  if (static_cast<int>(threadIdx.x) < shape.tile_tokens()) {
    shared.is_nearly_all[threadIdx.x] = is_nearly_all;
  }
  if (!__syncthreads_or(is_nearly_all)) return;
  for (int i = 0; i < shape.tile_tokens(); ++i) {
    if (!shared.is_nearly_all[i]) continue;
    const Rest rest = add_rest<T, Aligned>(a, shape, work, b, first + i,
                                           reinterpret_cast<float*>(memory), shared);
    if (threadIdx.x == 0) {
      static_cast<float*>(a.cosine)[static_cast<int64_t>(b) * shape.length + first + i] =
          cosine_of(shared.squared, rest);
    }
  }
}

}  // namespace

size_t token_contribution_workspace(const TokenContribution& a) {
  Pieces pieces(nullptr);
  take_workspace(a, pieces);
  return pieces.bytes();
}

void token_contribution(const TokenContribution& a, void* workspace, Stream stream) {
  const int64_t batch = a.query.size[0];
  if (batch == 0 || a.key.size[2] == 0) return;
  Pieces pieces(workspace);
  const Workspace work = take_workspace(a, pieces);
  const Shape shape(a);
  const int64_t units = batch * shape.kv_heads * shape.splits * shape.chunks;
  const size_t sums = shape.warps() * shape.row.width() * sizeof(float);
  const size_t heads = shape.compare_heads * shape.compare_head_bytes();
  OpStream ours(stream);
  with_type(a.query.dtype, [&](auto type) {
    with_bool(rows_are_aligned(a.key) && rows_are_aligned(a.value), [&](auto aligned) {
      using T = decltype(type);
      launch("token_contribution: attend", attend<T, aligned.value>, dim3(units), shape.threads(),
             AttendShared::bytes(shape), ours, a, shape, work);
      launch("token_contribution: combine", combine, dim3(batch * shape.heads), kCombineThreads, 0,
             ours, shape, work);
      launch("token_contribution: compare", compare<T, aligned.value>, dim3(batch * shape.tiles),
             shape.threads(), std::max(sums, heads), ours, a, shape, work);
    });
  });
}

}  // namespace vtp::cuda
