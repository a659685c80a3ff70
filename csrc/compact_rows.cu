// Row gathering for compact_rows and compact_kv: any dtype, all tensors of a call in one launch.
#include "cuda_ops.h"
#include "vtp/row_copy.cuh"

namespace vtp::cuda {
namespace {

// A block covers 512 bytes of a row, a warp's load, and one tile of a chain.
constexpr CopyShape kShape = {512, false};

// A tile's rows from where they were to where they go; zeros in the slots that none goes to.
template <class Piece>
VTP_DEVICE void copy_tile(const Chain& chain, const Place& place, bool align_right) {
  const int begin = chain.block * place.tile_step + place.slot;
  const auto slot_of = [&](int i) { return begin + i * place.row_step; };

  // Left aligned, the indices are under way before the count is waited for.
  int64_t index[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) index[i] = chain.index(slot_of(i));
  const int count = chain.count();
  int first = 0;  // real slots are [first, first + count)
  if (align_right) {
    first = chain.slots - count;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const bool real = slot_of(i) >= first && slot_of(i) < chain.slots;
      index[i] = real ? chain.indices[(slot_of(i) - first) * chain.index_stride] : 0;
    }
  }

  Piece pieces[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const bool real = slot_of(i) >= first && slot_of(i) < first + count;
    const char* row = chain.source + (real ? index[i] : 0) * chain.source_stride;
    pieces[i] = real ? *reinterpret_cast<const Piece*>(row + place.byte) : Piece{};
  }
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    char* row = chain.target + slot_of(i) * chain.target_stride;
    if (slot_of(i) < chain.slots) *reinterpret_cast<Piece*>(row + place.byte) = pieces[i];
  }
}

template <int Capacity>
__global__ void __launch_bounds__(kCopyThreads)
    compact_rows_kernel(const __grid_constant__ CopyPlan<Capacity> plan) {
  with_chain(plan, [&](const Chain& chain, const Place& place, auto piece) {
    copy_tile<decltype(piece)>(chain, place, plan.align_right);
  });
}

}  // namespace

size_t compact_rows_workspace(const CompactRows&) { return 0; }

void compact_rows(const CompactRows& a, void*, Stream stream) {
  for_each_plan(a, kShape, [&](const auto& plan, uint32_t blocks) {
    constexpr int kCapacity = std::decay_t<decltype(plan)>::kCapacity;
    launch("compact_rows", compact_rows_kernel<kCapacity>, blocks, kCopyThreads, 0, stream, plan);
  });
}

}  // namespace vtp::cuda
