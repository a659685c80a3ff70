// What kernels need from whoever compiles them: nvcc, or a C++ compiler with the emulator in
// tests/emulator, which runs the same source on a CPU. Nothing else tells the two apart, but for
// the instructions in async_copy.cuh, mma.cuh and wgmma.cuh that only PTX can name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "launch.cuh"

#define VTP_DEVICE __device__ __forceinline__

#ifdef VTP_EMULATOR

// Static shared memory: one object per block.
#define VTP_SHARED(Type, name) Type& name = ::vtp::emulator::shared<Type>(__COUNTER__)
// All of the launch's dynamic shared memory, aligned to 16 bytes.
#define VTP_DYNAMIC_SHARED(name) unsigned char* const name = ::vtp::emulator::dynamic_shared()

#else

#define VTP_SHARED(Type, name) __shared__ Type name
#define VTP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif

namespace vtp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of the workspace; with a null base it only counts.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }

  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace vtp::cuda
