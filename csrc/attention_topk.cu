// select_topk of attention_scores, bit for bit. Where a row's scores are made of little, those who
// select make them themselves, which saves launches and the wait for their last blocks: a cluster
// of blocks (sm_90 on), which also merges the statistics, or one block.
#include "cuda_ops.h"
#include "vtp/attention_parts.cuh"
#include "vtp/cluster_launch.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/joined_ops.cuh"
#include "vtp/select_row.cuh"

namespace vtp::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kKeysPerThread = 4;

// Floats that one block reads to make the scores of a row, or of its share of one. A multiprocessor
// reads some 64 bytes a cycle from L2: 256 KB take 2 us, as much as the launch that is saved.
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
  select_held_row<kThreads, kKeysPerThread>(ScoreRow<float>{scores}, length,
                                            select_row_of(a.select, batch), shared.select);
}

// --- by a cluster -----------------------------------------------------------------------------

constexpr int kClusterThreads = 512;
constexpr int kClusterKeysPerThread = 4;
constexpr int kRunKeys = kClusterThreads * kClusterKeysPerThread;

struct ClusterShared {
  RowWeights weights;
  MergeScratch<kClusterThreads> merge;
  BlockScratch<int> scratch;
  float scores[kRunKeys];
  ClusterScratch<kClusterThreads> select;
};

// The scores of a run of keys in shared memory.
struct RunScores {
  const float* scores;
  int begin;

  VTP_DEVICE float operator()(int key) const { return scores[key - begin]; }
};

// Each block merges the statistics of few rows for itself, which saves a barrier: they are an eighth
// of its share of the logits, or a quarter where tiles have 64 keys.
__global__ void __launch_bounds__(kClusterThreads, 1)
    finish_and_select_in_cluster(const AttentionTopk a, const AttentionParts parts) {
  VTP_SHARED(ClusterShared, shared);
  cluster_arrive();
  const int64_t batch = blockIdx.x / kClusterBlocks;
  const int length = static_cast<int>(a.attention.key.size[2]);
  const int thread = static_cast<int>(threadIdx.x);
  const Run run = run_of_block(length);
  const SelectRow row = select_row_of(a.select, batch);
  KeyMasks masks[kClusterKeysPerThread];
#pragma unroll
  for (int i = 0; i < kClusterKeysPerThread; ++i) {
    const int key = i * kClusterThreads + thread;
    masks[i].load(a.attention, batch, key < run.size ? run.begin + key : length);
  }
  const float factor = score_factor<kClusterThreads>(a.attention, batch, shared.scratch);
  await_earlier_kernels();
  if (parts.few_rows && parts.tiles > kStatisticParts) {
    merge_row_weights(a.attention, parts, batch, shared.merge, shared.weights);
  } else if (parts.few_rows) {
    load_row_weights<kClusterThreads>(a.attention, parts, batch, 0, shared.weights);
  }
  unsigned scored = 0;  // a bit for each of the thread's keys
#pragma unroll
  for (int i = 0; i < kClusterKeysPerThread; ++i) scored |= unsigned{masks[i].is_scored()} << i;
  __syncthreads();
  for (int key = thread; key < run.size; key += kClusterThreads, scored >>= 1) {
    shared.scores[key] = scored & 1 ? finished_score(a.attention, parts, batch, run.begin + key,
                                                     shared.weights, factor)
                                    : 0.0f;
  }
  select_cluster_row<kClusterThreads, kClusterKeysPerThread>(
      RunScores{shared.scores, run.begin}, length, row, shared.select);
  // Now that no barrier has to wait for them.
  float* scores = static_cast<float*>(a.attention.scores) + batch * length + run.begin;
  for (int key = thread; key < run.size; key += kClusterThreads) scores[key] = shared.scores[key];
  cluster_wait();
}

// --- host -------------------------------------------------------------------------------------

// Whether so many blocks for a row are enough, each holding so many keys.
bool fits(const AttentionScores& a, const AttentionParts& parts, int blocks, int keys) {
  const int64_t rows = parts.few_rows ? parts.rows : a.key.size[1], length = a.key.size[2];
  return rows <= kWeightRows && length <= int64_t{blocks} * keys &&
         rows * length <= blocks * kMostFloats;
}

bool fits_clusters(const AttentionScores& a, const AttentionParts& parts) {
  return fits(a, parts, kClusterBlocks, kRunKeys) &&
         a.query.size[0] <= clusters_at_once("attention_topk", finish_and_select_in_cluster,
                                             kClusterBlocks, kClusterThreads);
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
  AttentionParts parts = attention_parts(a.attention, pieces);
  OpStream ours(stream);
  if (fits_clusters(a.attention, parts)) {
    if (parts.few_rows) parts.softmax = nullptr;
    compute_attention_parts(a.attention, parts, ours);
    const dim3 grid(static_cast<unsigned>(a.attention.query.size[0] * kClusterBlocks));
    return launch(LaunchOptions{kClusterBlocks}, "attention_topk in clusters",
                  finish_and_select_in_cluster, grid, dim3(kClusterThreads), 0, ours, a, parts);
  }
  if (!fits(a.attention, parts, 1, kThreads * kKeysPerThread)) {
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
