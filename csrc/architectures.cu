// Which GPUs this library has code for.
#include <cuda_runtime.h>

#include "cuda_ops.h"

namespace vtp::cuda {
namespace {

// Stands for all kernels: each is compiled for the same architectures.
__global__ void probe() {}

}  // namespace

const char* architectures() { return VTP_CUDA_ARCHS; }

Image image(int device) {
  int current = 0;
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(current);
  }
  cudaGetLastError();  // asking must leave no error behind for the next launch
  if (status != cudaSuccess) return {0, 0, cudaGetErrorString(status)};
  return {attributes.binaryVersion, attributes.ptxVersion, nullptr};
}

}  // namespace vtp::cuda
