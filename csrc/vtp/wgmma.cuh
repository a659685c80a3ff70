// Matrix products of a warpgroup, four warps in a row, straight from shared memory: sums in float32
// of 16-bit floats, D[64, 128] += A[64, 16] B[128, 16]^T. Only code for compute capability 9.0
// itself, compiled as 9.0a, has the instruction: neither PTX nor a later device knows it.
//
// Operands lie in tiles of rows of 64 elements. Rows are 128 bytes apart, and eight of them, 1024
// bytes, are what the tensor core's swizzle repeats: unit c of 16 bytes of row r lies in place
// c ^ (r % 8), so that a column of units is spread over all banks. Longer rows take several tiles.
//
// Products run on their own. What is written to shared memory in the ordinary way has to be fenced
// for them by each thread that wrote, before a barrier; the sums are the hardware's from
// begin_products() until wait_products(), and so are the operands.
//
// With g = lane / 4 and t = lane % 4, a lane of warp w holds
//   D: d[4 n + 2 i + j] = D[16 w + g + 8 i][8 n + 2 t + j]
#pragma once

#include <cstring>
#include <type_traits>

#include "vector.cuh"

namespace vtp::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kProductRows = 64, kProductColumns = 128;
constexpr int kProductSums = kProductRows * kProductColumns / kWarpgroup;  // of a thread

// Rows of 64 elements of 16 bits, laid out as above.
template <int Rows>
struct alignas(1024) OperandTile {
  static constexpr int kUnits = 8;     // of a row
  static constexpr int kPeriod = 8;    // rows
  static constexpr int kProducts = 4;  // that go through a row
  static_assert(Rows % kPeriod == 0);

  int4 unit[Rows][kUnits];

  VTP_DEVICE int4* at(int row, int c) { return &unit[row][c ^ row % kPeriod]; }
};

// Dynamic shared memory for a struct of tiles: it need not begin where one may.
template <class Tiles>
constexpr size_t kTileBytes = sizeof(Tiles) + alignof(Tiles) - 16;

template <class Tiles>
VTP_DEVICE Tiles& tiles_in(unsigned char* shared) {
  const uintptr_t missing = -reinterpret_cast<uintptr_t>(shared) % alignof(Tiles);
  return *reinterpret_cast<Tiles*>(shared + missing);
}

// The lowest 18 bits, in units of 16 bytes.
VTP_DEVICE uint64_t descriptor_bits(uint32_t bytes) { return (bytes & 0x3ffffu) >> 4; }

// Names columns 16 product ... 16 product + 15 of a tile to the hardware. (The hardware adds the
// offset of the columns before it swizzles; the tile begins where the pattern does.)
template <int Rows>
VTP_DEVICE uint64_t operand(const OperandTile<Rows>& tile, int product) {
#ifdef VTP_EMULATOR
  const uint32_t address = emulator::shared_address(&tile);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(&tile));
#endif
  constexpr uint64_t kSwizzle128 = 1;         // of rows of 128 bytes
  constexpr uint64_t kUnused = 1;             // stride between tiles side by side
  constexpr uint32_t kPeriodBytes = 8 * 128;  // from eight rows to the next eight
  return descriptor_bits(address + 32 * product) | kUnused << 16 |
         descriptor_bits(kPeriodBytes) << 32 | kSwizzle128 << 62;
}

// What the thread has written to shared memory can be read by products behind the next barrier.
VTP_DEVICE void fence_operands() {
#if defined(VTP_EMULATOR)
  emulator::fence_operands();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(VTP_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VTP_HAS_WGMMA 1
#endif

#if defined(VTP_EMULATOR)

using emulator::begin_products;
using emulator::commit_products;

template <class T>
VTP_DEVICE void wgmma(float (&d)[kProductSums], uint64_t a, uint64_t b, bool accumulate) {
  const auto widened = [](uint16_t bits) {
    T x;
    static_assert(sizeof x == sizeof bits);
    memcpy(&x, &bits, sizeof x);
    return to_float(x);
  };
  emulator::wgmma(d, kProductColumns, a, b, accumulate, widened);
}

VTP_DEVICE void wait_products(float (&)[kProductSums]) { emulator::wait_products(); }

#else

// All sums of a thread as operands of an instruction.
#define VTP_SUMS_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VTP_SUMS(d)                                                                            \
  VTP_SUMS_8(d, 0), VTP_SUMS_8(d, 8), VTP_SUMS_8(d, 16), VTP_SUMS_8(d, 24), VTP_SUMS_8(d, 32), \
      VTP_SUMS_8(d, 40), VTP_SUMS_8(d, 48), VTP_SUMS_8(d, 56)
#ifdef VTP_HAS_WGMMA
#define VTP_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define VTP_WGMMA(...)
#endif
#define VTP_MULTIPLY(type)                                                                \
  VTP_WGMMA(                                                                              \
      "{.reg .pred p; setp.ne.b32 p, %66, 0; "                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1, 0, 0;}"                                                         \
      : VTP_SUMS(d)                                                                       \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// The registers are the products' from here on.
VTP_DEVICE void begin_products() { VTP_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }

// d += a b^T, or d = a b^T. Every thread of the warpgroup calls it with the same operands.
template <class T>
VTP_DEVICE void wgmma(float (&d)[kProductSums], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    VTP_MULTIPLY("f16");
  } else {
    VTP_MULTIPLY("bf16");
  }
}

// Closes a group of products.
VTP_DEVICE void commit_products() { VTP_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups. The sums are named so that nothing reads them before.
VTP_DEVICE void wait_products(float (&d)[kProductSums]) {
  VTP_WGMMA("wgmma.wait_group.sync.aligned 0;" : VTP_SUMS(d)::"memory");
}

#undef VTP_MULTIPLY
#undef VTP_WGMMA
#undef VTP_SUMS
#undef VTP_SUMS_8

#endif

}  // namespace vtp::cuda
