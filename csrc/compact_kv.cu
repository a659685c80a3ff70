// compact_kv in place: rows move forward within the same storage, all tensors of a call in one
// launch.
#include "cuda_ops.h"
#include "vtp/row_copy.cuh"

namespace vtp::cuda {
namespace {

// Indices ascend, so a row lies at its slot or behind it and a tile's rows lie at or behind its
// first slot. A block that follows its chain tile by tile thus overwrites nothing that a later tile
// reads, and within a tile reads come before writes. Chains of 128 bytes, a cache line, make enough
// blocks of even a few heads.
constexpr CopyShape kShape = {128, true};
constexpr int kBlocksPerSm = 8;  // of a tile each: up to 64 KB of rows under way

// The indices of a thread's slots of a tile. An int holds any row of a KV cache and leaves 64
// registers enough.
struct Sources {
  int row[kRowsPerThread];
};

template <class Piece>
struct Tile {
  Piece pieces[kRowsPerThread];
  bool moves[kRowsPerThread];
};

VTP_DEVICE Sources read_sources(const Chain& chain, const Place& place, int begin) {
  Sources sources;
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    sources.row[i] = static_cast<int>(chain.index(begin + place.slot + i * place.row_step));
  }
  return sources;
}

// Slots past the count and rows that are in their slot stay as they are.
template <class Piece>
VTP_DEVICE Tile<Piece> read_tile(const Chain& chain, const Place& place, int begin, int count,
                                 const Sources& sources) {
  Tile<Piece> tile;
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int slot = begin + place.slot + i * place.row_step;
    const char* row = chain.target + sources.row[i] * chain.target_stride;
    tile.moves[i] = slot < count && sources.row[i] != slot;
    tile.pieces[i] = tile.moves[i] ? *reinterpret_cast<const Piece*>(row + place.byte) : Piece{};
  }
  return tile;
}

template <class Piece>
VTP_DEVICE void write_tile(const Tile<Piece>& tile, char* row, int64_t row_step) {
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    if (tile.moves[i]) *reinterpret_cast<Piece*>(row) = tile.pieces[i];
    row += row_step;
  }
}

// While a tile is written, the next one and the indices of the one behind it are under way.
template <class Piece>
VTP_DEVICE void move_chain(const Chain& chain, const Place& place) {
  const int step = place.tile_step;
  const Sources sources = read_sources(chain, place, 0);
  Sources ahead = read_sources(chain, place, step);
  const int count = chain.count();
  Tile<Piece> tile = read_tile<Piece>(chain, place, 0, count, sources);
  const int64_t row_step = place.row_step * chain.target_stride;
  char* row = chain.target + place.byte + place.slot * chain.target_stride;
  for (int begin = 0; begin < count; begin += step) {
    const Tile<Piece> next = read_tile<Piece>(chain, place, begin + step, count, ahead);
    ahead = read_sources(chain, place, begin + 2 * step);
    __syncthreads();
    write_tile(tile, row, row_step);
    row += kRowsPerThread * row_step;
    tile = next;
  }
}

template <int Capacity>
__global__ void __launch_bounds__(kCopyThreads, kBlocksPerSm)
    compact_rows_in_place_kernel(const __grid_constant__ CopyPlan<Capacity> plan) {
  with_chain(plan, [&](const Chain& chain, const Place& place, auto piece) {
    move_chain<decltype(piece)>(chain, place);
  });
}

}  // namespace

size_t compact_rows_in_place_workspace(const CompactRows&) { return 0; }

void compact_rows_in_place(const CompactRows& a, void*, Stream stream) {
  for_each_plan(a, kShape, [&](const auto& plan, uint32_t blocks) {
    constexpr int kCapacity = std::decay_t<decltype(plan)>::kCapacity;
    launch("compact_rows_in_place", compact_rows_in_place_kernel<kCapacity>, blocks, kCopyThreads,
           0, stream, plan);
  });
}

}  // namespace vtp::cuda
