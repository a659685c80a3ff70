// select_topk of attention_scores, bit for bit. Where a row's scores are made of little, the block
// that selects makes them itself, which saves a launch and the wait for its last block.
#include "cuda_ops.h"
#include "vtp/attention_parts.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/joined_ops.cuh"
#include "vtp/select_row.cuh"

namespace vtp::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kKeysPerThread = 4;

// Floats that one block reads to make a row's scores. One multiprocessor reads some 64 bytes a
// cycle from L2: 256 KB take 2 us, as much as the launch that is saved.
constexpr int64_t kMostFloats = 1 << 16;

struct Shared {
  RowWeights weights;
  BlockScratch<int> scratch;
  SelectScratch<kThreads> select;
};

__global__ void __launch_bounds__(kThreads)
    finish_and_select(const AttentionTopk a, const AttentionParts parts) {
  VTP_SHARED(Shared, shared);
  const int64_t batch = blockIdx.x;
  const int length = static_cast<int>(a.attention.key.size[2]);
  const float factor = score_factor<kThreads>(a.attention, batch, shared.scratch);
  await_earlier_kernels();
  if (parts.few_rows) load_row_weights<kThreads>(a.attention, parts, batch, 0, shared.weights);
  __syncthreads();
  float* scores = static_cast<float*>(a.attention.scores) + batch * length;
  for (int key = static_cast<int>(threadIdx.x); key < length; key += kThreads) {
    KeyMasks masks;
    masks.load(a.attention, batch, key);
    scores[key] = masks.is_scored()
                      ? finished_score(a.attention, parts, batch, key, shared.weights, factor)
                      : 0.0f;
  }
  __syncthreads();
  select_held_row<kThreads, kKeysPerThread>(ScoreRow<float>{scores}, length,
                                            select_row_of(a.select, batch), shared.select);
}

bool fits_one_block(const AttentionScores& a, const AttentionParts& parts) {
  const int64_t rows = parts.few_rows ? parts.rows : a.key.size[1], length = a.key.size[2];
  return rows <= kWeightRows && length <= kThreads * kKeysPerThread &&
         rows * length <= kMostFloats;
}

}  // namespace

size_t attention_topk_workspace(const AttentionTopk& a) {
  Pieces pieces(nullptr);
  attention_parts(a.attention, pieces);
  pieces.take<char>(static_cast<int64_t>(select_topk_workspace(a.select)));
  return pieces.bytes();
}

void attention_topk(const AttentionTopk& a, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const AttentionParts parts = attention_parts(a.attention, pieces);
  OpStream ours(stream);
  if (!fits_one_block(a.attention, parts)) {
    // Begins with the same parts.
    attention_scores(a.attention, workspace, ours, false);
    const auto bytes = static_cast<int64_t>(select_topk_workspace(a.select));
    return select_topk(a.select, pieces.take<char>(bytes), ours);
  }
  compute_attention_parts(a.attention, parts, ours);
  launch("attention_topk", finish_and_select, dim3(static_cast<unsigned>(a.attention.query.size[0])),
         dim3(kThreads), 0, ours, a, parts);
}

}  // namespace vtp::cuda
