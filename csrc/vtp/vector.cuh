// Elements of the three float types, sixteen bytes at a time where rows allow it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../arguments.h"
#include "platform.cuh"

namespace vtp::cuda {

VTP_DEVICE float to_float(float x) { return x; }
VTP_DEVICE float to_float(__half x) { return __half2float(x); }
VTP_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
VTP_DEVICE T from_float(float x);
template <>
VTP_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
VTP_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
VTP_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kVectorBytes) Vector {
  T x[kVectorSize<T>];
};

// One 16-byte load; `row` must be aligned to it.
template <class T>
VTP_DEVICE void load_vector(const T* row, float (&out)[kVectorSize<T>]) {
  const int4 bits = *reinterpret_cast<const int4*>(row);
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof vector);
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) out[i] = to_float(vector.x[i]);
}

// The first `count` elements, any alignment; 0 beyond.
template <class T>
VTP_DEVICE void load_elements(const T* row, int count, float (&out)[kVectorSize<T>]) {
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) out[i] = i < count ? to_float(row[i]) : 0.0f;
}

// Host: whether all rows of a tensor whose last dimension is dense can be read by load_vector. With
// fewer than two entries in a dimension its stride says nothing.
template <int Rank>
bool rows_are_aligned(const Floats<Rank>& x) {
  const int64_t element = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0 &&
                 x.size[Rank - 1] * element % kVectorBytes == 0;
  for (int i = 0; i + 1 < Rank; ++i) {
    aligned = aligned && (x.size[i] <= 1 || x.stride[i] * element % kVectorBytes == 0);
  }
  return aligned;
}

// Host: calls f with a value of the dtype's device type.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(__half{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f64:
      break;
  }
  throw std::runtime_error("vtp_kernels: CUDA kernels do not serve float64");
}

// Host: calls f(std::true_type) or f(std::false_type).
template <class F>
void with_bool(bool value, const F& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace vtp::cuda
