// The little of CUDA's runtime that launch.cuh, cluster_launch.cuh and wgmma_launch.cuh in csrc/vtp
// call, for tests without a GPU: it refuses what a GPU refuses and writes down what it was asked.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
using cudaStream_t = struct Stream*;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct StubRuntime {
  struct Launch {
    const void* kernel;
    cudaLaunchConfig_t config;
    std::vector<cudaLaunchAttribute> attributes;
  };

  int device = 0;
  size_t most_shared = 227 << 10;
  std::map<const void*, cudaFuncAttributes> kernels;
  std::map<std::pair<int, const void*>, size_t> dynamic_granted;  // by device and kernel
  cudaError_t last_error = cudaSuccess;
  std::map<int, int> multiprocessors = {{0, 132}, {1, 4}};  // by device; a block each
  std::map<int, std::pair<int, int>> capability = {{0, {9, 0}}, {1, {10, 0}}, {2, {9, 1}}};
  int attributes_read = 0, attributes_set = 0, clusters_read = 0;
  std::vector<Launch> launches;
  std::function<void(void**)> run;  // is given a launch's arguments

  cudaError_t say(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
  }
};

inline StubRuntime runtime;

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}

inline cudaError_t cudaGetLastError() { return std::exchange(runtime.last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = runtime.device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto found = runtime.capability.find(device);
  if (found == runtime.capability.end()) return runtime.say(cudaErrorInvalidValue);
  const bool is_major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = is_major ? found->second.first : found->second.second;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ++runtime.attributes_read;
  *attributes = runtime.kernels.at(kernel);
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++runtime.attributes_set;
  if (runtime.kernels.at(kernel).sharedSizeBytes + bytes > runtime.most_shared) {
    return runtime.say(cudaErrorInvalidValue);
  }
  runtime.dynamic_granted[{runtime.device, kernel}] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                  const cudaLaunchConfig_t* config) {
  ++runtime.clusters_read;
  const bool is_cluster = config->numAttrs == 1 &&
                          config->attrs[0].id == cudaLaunchAttributeClusterDimension;
  if (!is_cluster) return runtime.say(cudaErrorInvalidValue);
  *count = runtime.multiprocessors.at(runtime.device) / config->attrs[0].val.clusterDim.x;
  return cudaSuccess;
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  const size_t dynamic = config->dynamicSmemBytes;
  const size_t total = runtime.kernels.at(kernel).sharedSizeBytes + dynamic;
  const auto granted = runtime.dynamic_granted.find({runtime.device, kernel});
  const bool asked = granted != runtime.dynamic_granted.end() && dynamic <= granted->second;
  if (total > (48 << 10) && !asked) return runtime.say(cudaErrorInvalidValue);
  runtime.launches.push_back({kernel, *config, {config->attrs, config->attrs + config->numAttrs}});
  if (runtime.run) runtime.run(arguments);
  return cudaSuccess;
}
