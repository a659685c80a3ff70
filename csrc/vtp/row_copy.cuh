// Rows moved from place to place, many tensors in one launch: what compact_rows and the in place
// compact_kv share.
//
// A chain is the row of slots of one (tensor, batch row, head), or where rows are wide a column of
// it. A tile is the part of a chain that a block holds in its registers at a time: neighbouring
// threads share a row, in pieces of up to 16 bytes, and each holds the same piece of kRowsPerThread
// rows, loads that do not wait for each other. Rows follow each other through the block whatever
// their number of pieces, so that few threads are without one: 2 of 128 where it is 9. At 12 blocks
// an SM that is 96 KB under way, where 25 KB hide the latency of the memory of an H200.
#pragma once

#include <algorithm>
#include <limits>

#include "../arguments.h"
#include "platform.cuh"

namespace vtp::cuda {

constexpr int kCopyThreads = 128;
constexpr int kRowsPerThread = 4;
constexpr uint32_t kReciprocalOne = 1 << 15;

// A tensor whose rows are cut into pieces.
struct CopyTensor {
  const char* source;
  char* target;
  const int64_t* indices;                      // of its layer
  const void* counts;                          // of its layer; null: all slots are real
  int64_t source_stride[3], target_stride[3];  // bytes: batch, head, row
  uint32_t heads;
  uint32_t row_pieces;
  uint32_t columns;       // blocks side by side on a row
  uint32_t chain_blocks;  // one behind the other on a chain
  uint16_t reciprocal;    // of column_pieces, times kReciprocalOne, rounded up
  uint8_t column_pieces;  // at most kWarp
  uint8_t piece_log2;     // bytes of a piece

  // thread / column_pieces: which of the rows that a block moves at once a thread has a piece of.
  // The reciprocal is too large by less than 1 / kReciprocalOne; times a thread that is less than
  // 1 / kWarp, and the quotient is exact.
  __host__ __device__ uint32_t row_of_thread(uint32_t thread) const {
    return thread * reciprocal / kReciprocalOne;
  }
};
static_assert(kCopyThreads * kWarp <= static_cast<int>(kReciprocalOne));

// All that a launch needs, passed by value: in device memory it would first have to be copied
// there. first_block stands apart from the tensors so that the search for a block's tensor touches
// few lines of the constant cache.
template <int Capacity>
struct CopyPlan {
  static constexpr int kCapacity = Capacity;

  uint32_t tensor_count;
  uint32_t blocks_per_tensor;  // where all tensors have as many, else 0
  int32_t slots;
  bool counts_are_int64;
  bool align_right;
  int64_t index_stride[3];  // elements: batch, head, slot
  int64_t count_stride[2];  // elements: batch, head
  uint32_t first_block[Capacity];
  CopyTensor tensors[Capacity];
};

constexpr int kMostTensors = 300;
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of a grid
constexpr int64_t kMostSlots = 1 << 29;
constexpr int kNoSlot = 1 << 29;  // past all of them, and an int yet some tiles behind the last one
static_assert(sizeof(CopyPlan<kMostTensors>) <= 32764, "the limit for the parameters of a kernel");

// What a block works on.
struct Chain {
  const char* source;
  char* target;
  const int64_t* indices;
  const void* counted;  // null: all slots are real
  bool counted_is_int64;
  int slots;
  int block;  // which of the blocks on this chain
  int64_t source_stride, target_stride, index_stride;

  // How many slots are real. All threads of a block read the same, and the compiler waits for such a
  // load where it stands: to be called when the loads that do not need it are under way.
  VTP_DEVICE int count() const {
    if (counted == nullptr) return slots;
    const int64_t count = counted_is_int64 ? *static_cast<const int64_t*>(counted)
                                           : *static_cast<const int32_t*>(counted);
    return count < 0 ? 0 : count < slots ? static_cast<int>(count) : slots;
  }

  // The index of a slot, past the last one of any; those past the count may be of no row.
  VTP_DEVICE int64_t index(int slot) const {
    return slot < slots ? indices[slot * index_stride] : 0;
  }
};

// Where a thread stands in a tile.
struct Place {
  int64_t byte;   // of its piece, in a row
  int slot;       // of its first row, in the first tile; kNoSlot where no row has this piece
  int row_step;   // slots from one of its rows to the next
  int tile_step;  // slots from one tile to the next
};

template <class Plan>
VTP_DEVICE uint32_t tensor_of_block(const Plan& plan) {
  if (plan.blocks_per_tensor > 0) return blockIdx.x / plan.blocks_per_tensor;
  uint32_t low = 0, high = plan.tensor_count;  // it is within [low, high)
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (plan.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Plan>
VTP_DEVICE const void* count_of_chain(const Plan& plan, const CopyTensor& t, int64_t batch,
                                      int64_t head) {
  if (t.counts == nullptr) return nullptr;
  const int64_t at = batch * plan.count_stride[0] + head * plan.count_stride[1];
  return static_cast<const char*>(t.counts) + at * (plan.counts_are_int64 ? 8 : 4);
}

// Calls f(chain, place, piece), piece a value of the type that moves one; the whole block takes the
// same way.
template <class Plan, class F>
VTP_DEVICE void with_chain(const Plan& plan, const F& f) {
  const uint32_t index = tensor_of_block(plan);
  const CopyTensor& t = plan.tensors[index];
  const uint32_t block = blockIdx.x - plan.first_block[index];

  const uint32_t above = block / t.columns, column = block - above * t.columns;
  const uint32_t number = above / t.chain_blocks;
  const int64_t batch = number / t.heads, head = number % t.heads;
  const Chain chain = {
      t.source + batch * t.source_stride[0] + head * t.source_stride[1],
      t.target + batch * t.target_stride[0] + head * t.target_stride[1],
      t.indices + batch * plan.index_stride[0] + head * plan.index_stride[1],
      count_of_chain(plan, t, batch, head),
      plan.counts_are_int64,
      plan.slots,
      static_cast<int>(above - number * t.chain_blocks),
      t.source_stride[2],
      t.target_stride[2],
      plan.index_stride[2],
  };

  const uint32_t slot = t.row_of_thread(threadIdx.x);
  const uint32_t piece_of_column = threadIdx.x - slot * t.column_pieces;
  const uint32_t piece = column * t.column_pieces + piece_of_column;
  const uint32_t rows = t.row_of_thread(kCopyThreads);
  const bool in_row = piece < t.row_pieces && slot < rows;
  const int row_step = static_cast<int>(rows);
  const Place place = {static_cast<int64_t>(piece) << t.piece_log2,
                       in_row ? static_cast<int>(slot) : kNoSlot, row_step,
                       row_step * kRowsPerThread};
  switch (t.piece_log2) {
    case 4:
      return f(chain, place, int4{});
    case 3:
      return f(chain, place, uint64_t{});
    case 2:
      return f(chain, place, uint32_t{});
    case 1:
      return f(chain, place, uint16_t{});
    default:
      return f(chain, place, uint8_t{});
  }
}

// ---- Host
// ----------------------------------------------------------------------------------------

// The widest piece that all rows consist of and are aligned to. With fewer than two entries in a
// dimension its stride says nothing.
inline int piece_log2_of(const RowTensor& t) {
  uint64_t bits = reinterpret_cast<uintptr_t>(t.source) | reinterpret_cast<uintptr_t>(t.target);
  bits |= static_cast<uint64_t>(t.row_bytes | t.source_stride[2] | t.target_stride[2]);
  if (t.batch > 1) bits |= static_cast<uint64_t>(t.source_stride[0] | t.target_stride[0]);
  if (t.heads > 1) bits |= static_cast<uint64_t>(t.source_stride[1] | t.target_stride[1]);
  int log2 = 4;
  while (bits & ((uint64_t{1} << log2) - 1)) --log2;
  return log2;
}

// A block covers up to `width` bytes of a row. Wider rows are cut into columns of about equal width,
// of whole sectors of 32 bytes where pieces have 16.
inline CopyTensor copy_tensor(const RowTensor& t, const RowIndices& rows, int width) {
  CopyTensor c = {};
  c.source = t.source, c.target = t.target;
  c.indices = rows.indices.at(t.layer);
  if (rows.counts) {
    const int64_t bytes = rows.counts.is_int64 ? sizeof(int64_t) : sizeof(int32_t);
    c.counts = static_cast<const char*>(rows.counts.data) + t.layer * rows.counts.stride[0] * bytes;
  }
  std::copy_n(t.source_stride, 3, c.source_stride);
  std::copy_n(t.target_stride, 3, c.target_stride);
  const int piece_log2 = piece_log2_of(t);
  const int64_t pieces = t.row_bytes >> piece_log2;
  const int64_t columns = divide_up(pieces, std::min(kWarp, width >> piece_log2));
  int64_t column_pieces = divide_up(pieces, columns);
  if (columns > 1 && piece_log2 == 4) column_pieces += column_pieces % 2;
  c.heads = static_cast<uint32_t>(t.heads);
  c.row_pieces = static_cast<uint32_t>(pieces);
  c.columns = static_cast<uint32_t>(divide_up(pieces, column_pieces));
  c.reciprocal = static_cast<uint16_t>(divide_up(kReciprocalOne, column_pieces));
  c.column_pieces = static_cast<uint8_t>(column_pieces);
  c.piece_log2 = static_cast<uint8_t>(piece_log2);
  return c;
}

struct CopyShape {
  int width;       // bytes of a row that a block covers
  bool one_block;  // it follows its chain to the end; else there is a block for every tile
};

// Takes tensors from `first` on, as many as there is room for, and returns the first not taken.
template <int Capacity>
int64_t fill_plan(const CompactRows& a, CopyShape shape, int64_t first, CopyPlan<Capacity>& plan,
                  uint32_t* blocks) {
  const auto& indices = a.rows.indices;
  plan.tensor_count = 0;
  plan.slots = static_cast<int32_t>(indices.size[3]);
  plan.counts_are_int64 = a.rows.counts.is_int64;
  plan.align_right = a.align_right;
  std::copy_n(indices.stride + 1, 3, plan.index_stride);
  std::copy_n(a.rows.counts.stride + 1, 2, plan.count_stride);

  int64_t total = 0;
  bool alike = true;
  for (; first < a.tensor_count && plan.tensor_count < Capacity; ++first) {
    const RowTensor& t = a.tensors[first];
    if (t.batch * t.heads * t.row_bytes * indices.size[3] == 0) continue;
    CopyTensor c = copy_tensor(t, a.rows, shape.width);
    const int64_t tile = c.row_of_thread(kCopyThreads) * kRowsPerThread;
    c.chain_blocks = shape.one_block ? 1 : static_cast<uint32_t>(divide_up(plan.slots, tile));
    const int64_t tensor_blocks = t.batch * t.heads * c.chain_blocks * c.columns;
    if (total + tensor_blocks > kMostBlocks) {
      if (total == 0) {
        throw std::runtime_error("vtp_kernels: a tensor must take at most " +
                                 std::to_string(kMostBlocks) + " blocks to be moved, got " +
                                 std::to_string(tensor_blocks));
      }
      break;
    }
    plan.first_block[plan.tensor_count] = static_cast<uint32_t>(total);
    plan.tensors[plan.tensor_count++] = c;
    total += tensor_blocks;
    alike = alike && total == tensor_blocks * plan.tensor_count;
  }
  plan.blocks_per_tensor =
      alike && total > 0 ? static_cast<uint32_t>(total / plan.tensor_count) : 0;
  *blocks = static_cast<uint32_t>(total);
  return first;
}

// Calls f(plan, blocks), once for up to kMostTensors tensors; a plan is no larger than it needs to
// be, since all of it travels with the launch. 80 tensors are the keys and values of 40 layers.
template <class F>
void for_each_plan(const CompactRows& a, CopyShape shape, const F& f) {
  if (a.rows.indices.size[3] > kMostSlots) {
    throw std::runtime_error("vtp_kernels: indices must have rows of at most " +
                             std::to_string(kMostSlots) + ", got " +
                             std::to_string(a.rows.indices.size[3]));
  }
  for (int64_t first = 0; first < a.tensor_count;) {
    const auto run = [&](auto& plan) {
      uint32_t blocks = 0;
      first = fill_plan(a, shape, first, plan, &blocks);
      f(plan, blocks);
    };
    const int64_t rest = a.tensor_count - first;
    if (rest <= 16) {
      CopyPlan<16> plan;
      run(plan);
    } else if (rest <= 80) {
      CopyPlan<80> plan;
      run(plan);
    } else {
      CopyPlan<kMostTensors> plan;
      run(plan);
    }
  }
}

}  // namespace vtp::cuda
