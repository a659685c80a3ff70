// What passes over K are told and share: which keys and query rows a block meets. key_pass in
// attention_scores.cu serves everywhere, warpgroup_pass in attention_scores_warpgroup.cu where
// products of a warpgroup pay.
#pragma once

#include "attention_parts.cuh"

namespace vtp::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPassKeys = 128;  // of a block, if they have 256 bytes or less

enum class Pass { statistics, columns };

struct PassArguments {
  AttentionScores a;
  AttentionParts parts;
  int group;                   // query heads of a KV head
  int segments, segment_rows;  // rows that one sum is over, and how many such sums
  float factor;                // of the logits
};

// Where a block works.
struct Block {
  int tile, kv_head;
  int64_t batch;
};

VTP_DEVICE Block block_of(const PassArguments& p) {
  const unsigned tiles = static_cast<unsigned>(p.parts.tiles), unit = blockIdx.x / tiles;
  const unsigned kv_heads = static_cast<unsigned>(p.a.key.size[1]);
  return {static_cast<int>(blockIdx.x % tiles), static_cast<int>(unit % kv_heads),
          unit / kv_heads};
}

// --- query rows -------------------------------------------------------------------------------

// A tile of query rows, consecutive among those of the KV head and of one segment.
template <int Rows>
struct RowTile {
  int first, count;
  int left;  // in the segment, this tile included

  VTP_DEVICE explicit RowTile(const PassArguments& p) : first(0), left(p.segment_rows) { cut(); }

  VTP_DEVICE RowTile next(const PassArguments& p) const {
    RowTile tile = *this;
    tile.first += count;
    tile.left = ends_segment() ? p.segment_rows : left - count;
    tile.cut();
    return tile;
  }

  VTP_DEVICE bool exists(const PassArguments& p) const {
    return first < p.segments * p.segment_rows;
  }
  VTP_DEVICE bool ends_segment() const { return count == left; }

 private:
  VTP_DEVICE void cut() { count = left < Rows ? left : Rows; }
};

struct QueryRow {
  int head, m;

  VTP_DEVICE QueryRow(const PassArguments& p, const Block& block, int packed) {
    const auto row = static_cast<unsigned>(packed);
    const auto queries = static_cast<unsigned>(p.a.query.size[2]);
    head = block.kv_head * p.group + static_cast<int>(row / queries);
    m = static_cast<int>(row % queries);
  }
};

// What a row's constants are made of, as it lies in memory.
template <Pass P>
struct RawWeight {
  RowSight sight;
  RowSoftmax softmax;

  VTP_DEVICE void load(const PassArguments& p, const Block& block, QueryRow row) {
    sight.load(p.a, block.batch, row.head, row.m);
    softmax = {0.0f, 1.0f};  // the statistics pass has no use for it
    if (P == Pass::columns && !p.a.lse) {
      const int64_t number = row.head * p.a.query.size[2] + row.m;
      softmax = p.parts.softmax[block.batch * p.parts.rows + number];
    }
  }

  VTP_DEVICE RowWeight weight(const PassArguments& p) const {
    const float base = P == Pass::columns && p.a.lse ? kLog2e * sight.lse : softmax.base;
    return {base, softmax.share, sight.last_key(p.a)};
  }
};

// --- keys -------------------------------------------------------------------------------------

// The bits of keys up to `last`, of those from `first` on.
VTP_DEVICE unsigned bits_until(int last, int first) {
  const int count = last - first + 1;
  return count <= 0 ? 0 : count >= kWarp ? kAllLanes : (1u << count) - 1;
}

// A warp's keys, a lane each.
template <Pass P>
struct WarpKeys {
  bool exists;
  KeyMasks masks;  // 1 where the pass does not ask

  // What is masked is not read, but where the pass before has just read K: from L2 it comes no
  // later than the masks.
  static VTP_DEVICE bool masks_come_first(const AttentionScores& a) {
    return P == Pass::statistics ? a.valid || a.candidates_only : static_cast<bool>(a.lse);
  }

  VTP_DEVICE WarpKeys(const AttentionScores& a, int first, int count)
      : exists(lane_id() < count && first + lane_id() < a.key.size[2]), masks{1, 1} {}

  VTP_DEVICE void load_masks(const AttentionScores& a, int64_t batch, int first) {
    const int key = first + lane_id();
    if (exists && (P == Pass::columns || a.candidates_only)) {
      masks.candidate = a.candidates.at(batch, key)->byte;
    }
    if (exists && a.valid) masks.valid = a.valid.at(batch, key)->byte;
  }

  // Whether the pass has to do with the lane's own.
  VTP_DEVICE bool is_wanted() const { return exists && masks.is_scored(); }

  // A bit for each that it has to do with.
  VTP_DEVICE unsigned wanted() const { return __ballot_sync(kAllLanes, is_wanted()); }

  // The same for those to read.
  VTP_DEVICE unsigned read(const AttentionScores& a) const {
    return masks_come_first(a) ? wanted() : __ballot_sync(kAllLanes, exists);
  }
};

VTP_DEVICE void write_no_statistics(const PassArguments& p, const Block& block) {
  const int64_t rows = p.group * p.a.query.size[2];
  RowStatistic* out =
      p.parts.statistics + (block.batch * p.parts.tiles + block.tile) * p.parts.rows;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    out[block.kv_head * rows + i] = no_logits();
  }
}

// Host. Starts the pass with products of a warpgroup, a block for each tile of keys, if there is
// code for them and they pay; else starts nothing and returns false.
template <Pass P>
bool launch_warpgroup_pass(const PassArguments& p, dim3 grid, OpStream& stream);

}  // namespace vtp::cuda
