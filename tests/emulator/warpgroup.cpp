// Products of a warpgroup in a small kernel, right and with planted mistakes, for test_warpgroup.py.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "module.h"
#include "vtp/async_copy.cuh"
#include "vtp/warp.cuh"
#include "vtp/wgmma.cuh"

namespace py = pybind11;

namespace vtp::cuda {
namespace {

constexpr const char* kMistakes[] = {
    "none",
    // of the layout
    "unswizzled", "no_swizzle", "swizzle_64", "swizzle_32", "short_stride", "long_stride",
    "misaligned", "next_columns", "swapped", "base_offset", "reserved_bits", "not_there",
    // of order
    "no_fence", "fence_before_writes", "some_fence", "no_barrier", "barrier_before_fence",
    "no_begin", "no_commit", "no_wait", "late_sums", "overwritten", "overwritten_by_others", "rewritten",
    // of who multiplies
    "different_operands", "part_of_a_warpgroup"};

struct Mistake {
  int number;

  bool is(const char* name) const { return std::strcmp(kMistakes[number], name) == 0; }
};

constexpr int kTiles = 2, kDepth = 64 * kTiles;

struct Tiles {
  OperandTile<kProductRows> a[kTiles];
  OperandTile<kProductColumns> b[kTiles];
  int4 behind[8];  // where a tile that begins late ends
};

// Rows of kDepth elements, to tiles.
template <int Rows>
VTP_DEVICE void fill(OperandTile<Rows> (&tiles)[kTiles], const uint16_t* rows, Mistake mistake) {
  constexpr int kUnits = 8;
  for (int i = threadIdx.x; i < Rows * kUnits * kTiles; i += kWarpgroup) {
    const int row = i / kUnits % Rows, c = i % kUnits, tile = i / kUnits / Rows;
    const uint16_t* source = rows + row * kDepth + tile * 64 + c * 8;
    int4* target = mistake.is("unswizzled") ? &tiles[tile].unit[row][c] : tiles[tile].at(row, c);
    if (mistake.is("misaligned")) target += kUnits;
    memcpy(target, source, sizeof *target);
  }
}

VTP_DEVICE uint64_t spoilt(uint64_t operand, Mistake mistake) {
  constexpr uint64_t kStride = 0x3fffull << 32, kSwizzle = 3ull << 62;
  if (mistake.is("no_swizzle")) return operand & ~kSwizzle;
  if (mistake.is("swizzle_64")) return (operand & ~kSwizzle) | 2ull << 62;
  if (mistake.is("swizzle_32")) return operand | kSwizzle;
  if (mistake.is("short_stride")) return (operand & ~kStride) | 512ull / 16 << 32;
  if (mistake.is("long_stride")) return (operand & ~kStride) | 2048ull / 16 << 32;
  if (mistake.is("misaligned")) return operand + 128 / 16;
  if (mistake.is("next_columns")) return operand + 16 / 16;
  if (mistake.is("base_offset")) return operand | 1ull << 49;
  if (mistake.is("reserved_bits")) return operand | 1ull << 46;
  if (mistake.is("not_there")) return operand + 0x2000;
  return operand;
}

template <class T>
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* d, Mistake mistake) {
  VTP_DYNAMIC_SHARED(memory);
  auto& tiles = tiles_in<Tiles>(memory);
  const int warp = warp_id();
  if (mistake.is("fence_before_writes")) fence_operands();
  fill(tiles.a, a, mistake);
  fill(tiles.b, b, mistake);
  if (mistake.is("barrier_before_fence")) __syncthreads();
  const bool fences = !mistake.is("no_fence") && !mistake.is("fence_before_writes") &&
                      !(mistake.is("some_fence") && warp == 2);
  if (fences) fence_operands();
  if (!mistake.is("barrier_before_fence") && !mistake.is("no_barrier")) __syncthreads();
  float sums[kProductSums];
  if (mistake.is("part_of_a_warpgroup") && warp == 3) return;
  if (!mistake.is("no_begin")) begin_products();
  for (int i = 0; i < 4 * kTiles; ++i) {
    uint64_t x = spoilt(operand(tiles.a[i / 4], i % 4), mistake);
    uint64_t y = spoilt(operand(tiles.b[i / 4], i % 4), mistake);
    if (mistake.is("different_operands") && warp == 1) y = operand(tiles.b[i / 4], 0);
    if (mistake.is("swapped")) std::swap(x, y);
    wgmma<T>(sums, x, y, i > 0);
  }
  if (!mistake.is("no_commit")) commit_products();
  if (mistake.is("late_sums")) sums[0] = 1.0f;
  if (mistake.is("overwritten")) tiles.a[0].unit[5][0] = int4{1, 2, 3, 4};
  if (!mistake.is("no_wait")) wait_products(sums);
  // Others of the warpgroup may still multiply.
  int4& others = tiles.b[1].unit[threadIdx.x][0];
  if (mistake.is("overwritten_by_others")) others = int4{1, 2, 3, 4};
  if (mistake.is("rewritten")) *const_cast<volatile int*>(&others.x) = others.x;
  for (int i = 0; i < kProductSums; ++i) {
    const int row = warp * 16 + lane_id() / 4 + i % 4 / 2 * 8;
    d[row * kProductColumns + i / 4 * 8 + lane_id() % 4 * 2 + i % 2] = sums[i];
  }
}

using Bits = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<float> product(Bits a, Bits b, const std::string& mistake) {
  const auto at = std::find(std::begin(kMistakes), std::end(kMistakes), mistake);
  if (at == std::end(kMistakes)) throw std::runtime_error("no mistake " + mistake);
  py::array_t<float> d({kProductRows, kProductColumns});
  launch("product", product_kernel<T>, 1, kWarpgroup, kTileBytes<Tiles>, nullptr, a.data(), b.data(),
         d.mutable_data(), Mistake{static_cast<int>(at - std::begin(kMistakes))});
  return d;
}

template <class T>
void launch_planted(const char* mistake) {
  Bits a({kProductRows, kDepth}), b({kProductColumns, kDepth});
  std::fill_n(a.mutable_data(), a.size(), 0x3c00);
  std::fill_n(b.mutable_data(), b.size(), 0x3c00);
  product<T>(a, b, mistake);
}

}  // namespace
}  // namespace vtp::cuda

namespace vtp::emulator {

void bind_warpgroup(py::module_ m, py::module_ defects) {
  using namespace vtp::cuda;
  m.def("product_float16", product<__half>);
  m.def("product_bfloat16", product<__nv_bfloat16>);
  for (const char* mistake : kMistakes) {
    defects.def((std::string("product_") + mistake).c_str(),
                [mistake] { launch_planted<__half>(mistake); });
  }
}

}  // namespace vtp::emulator
