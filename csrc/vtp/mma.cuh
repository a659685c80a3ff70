// Warp-wide matrix products of 16-bit floats, sums in float32: D[16, 8] += A[16, 16] B[16, 8].
//
// With g = lane / 4 and t = lane % 4, a lane holds (each register two neighbouring elements)
//   A: a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   B: b[0] = B[2t..][g], b[1] = B[2t + 8..][g]
//   D: d[0..1] = D[g][2t..], d[2..3] = D[g + 8][2t..]
// Devices without the instruction (bfloat16 on sm_75) pass the operands around with shuffles.
#pragma once

#include <cstring>

#include "vector.cuh"

namespace vtp::cuda {

template <class T>
struct Pair {
  T x[2];
};

template <class T>
VTP_DEVICE Pair<T> unpack(uint32_t bits) {
  Pair<T> pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}

template <class T>
VTP_DEVICE uint32_t pack(float x, float y) {
  const Pair<T> pair = {{from_float<T>(x), from_float<T>(y)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

namespace plain {

template <class T>
VTP_DEVICE float dot(uint32_t a, uint32_t b, float sum) {
  const Pair<T> x = unpack<T>(a), y = unpack<T>(b);
  sum = fmaf(to_float(x.x[0]), to_float(y.x[0]), sum);
  return fmaf(to_float(x.x[1]), to_float(y.x[1]), sum);
}

#ifdef VTP_EMULATOR

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
VTP_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Operands* lanes = emulator::all_lanes(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int p = 0; p < 8; ++p) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = lanes[g * 4 + p % 4].a[p / 4 * 2 + i / 2];
      const uint32_t y = lanes[(2 * t + i % 2) * 4 + p % 4].b[p / 4];
      d[i] = dot<T>(x, y, d[i]);
    }
  }
}

#else

template <class T>
VTP_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    const uint32_t low = __shfl_sync(kAllLanes, a[p / 4 * 2], g * 4 + p % 4);
    const uint32_t high = __shfl_sync(kAllLanes, a[p / 4 * 2 + 1], g * 4 + p % 4);
    const uint32_t even = __shfl_sync(kAllLanes, b[p / 4], 2 * t * 4 + p % 4);
    const uint32_t odd = __shfl_sync(kAllLanes, b[p / 4], (2 * t + 1) * 4 + p % 4);
    d[0] = dot<T>(low, even, d[0]);
    d[1] = dot<T>(low, odd, d[1]);
    d[2] = dot<T>(high, even, d[2]);
    d[3] = dot<T>(high, odd, d[3]);
  }
}

#endif

}  // namespace plain

#define VTP_MMA_16816(type)                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d += a b; every lane of the warp calls it.
template <class T>
VTP_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    VTP_MMA_16816("f16");
  } else {
    VTP_MMA_16816("bf16");
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
  if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  } else {
    plain::mma<T>(d, a, b);
  }
#else
  plain::mma<T>(d, a, b);
#endif
}

#undef VTP_MMA_16816

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i names row i % 8 of matrix i / 8
// (8 elements, 16-byte aligned). Register m of a lane gets elements [lane / 4][2 * (lane % 4)..] of
// matrix m, or of its transpose.
template <bool Transposed = false>
VTP_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
#if defined(VTP_EMULATOR)
  const emulator::MatrixLoad load(row);
  const void* const* rows = emulator::all_lanes(row);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = Transposed ? 2 * t + i : g, c = Transposed ? g : 2 * t + i;
      pair[i] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
    }
    memcpy(&out[matrix], pair, sizeof pair);
  }
#elif defined(__CUDA_ARCH__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

}  // namespace vtp::cuda
