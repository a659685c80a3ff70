// Which GPUs this library has code for.
#include "cuda_ops.h"
#include "vtp/platform.cuh"

namespace vtp::cuda {
namespace {

// Stands for all kernels: each is compiled for the same architectures.
__global__ void probe() {}

}  // namespace

const char* architectures() { return VTP_CUDA_ARCHS; }

const char* why_no_image(int device) {
  int current = 0;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, probe);
    cudaSetDevice(current);
  }
  cudaGetLastError();  // asking must leave no error behind for the next launch
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace vtp::cuda
