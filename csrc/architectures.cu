// Which GPUs this library has code for.
#include <cuda_runtime.h>

#include <thread>

#include "cuda_ops.h"

namespace vtp::cuda {
namespace {

// Stands for all kernels: each is compiled for the same architectures.
__global__ void probe() {}

}  // namespace

const char* architectures() { return VTP_CUDA_ARCHS; }

// The device is made current on a thread of its own. From CUDA 12 on, setting a thread back to a
// device makes a context there, half a gigabyte on a GPU that the process may never use.
Image image(int device) {
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaSuccess;
  std::thread([&] {
    status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, probe);
  }).join();
  if (status != cudaSuccess) return {0, 0, cudaGetErrorString(status)};
  return {attributes.binaryVersion, attributes.ptxVersion, nullptr};
}

}  // namespace vtp::cuda
