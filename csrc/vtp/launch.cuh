// How the host starts a kernel, with what a GPU wants to be asked for first: much shared memory, or
// from compute capability 9.0 on clusters of blocks and a start that overlaps the kernel before
// (dependent_launch.cuh has the kernels' part of that).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef VTP_EMULATOR
#include "emulator.h"
#else
#include <map>
#include <mutex>
#include <utility>
#endif

namespace vtp::cuda {

using Stream = void*;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would be told of it
  throw std::runtime_error(std::string("vtp_kernels: ") + what + ": " + cudaGetErrorString(status));
}

// The stream of one op call. The first kernel on it is launched plainly, since what runs before it
// is not ours. Every further one depends on the one before and waits for it by itself, where the
// device and the code for it can do that; captured in a CUDA graph (12.3 on) it does the same.
class OpStream {
 public:
  explicit OpStream(Stream stream) : stream_(stream) {}
  OpStream(const OpStream&) = delete;
  OpStream& operator=(const OpStream&) = delete;

  Stream get() const { return stream_; }
  bool has_begun() const { return has_begun_; }
  void begin() { has_begun_ = true; }

 private:
  Stream stream_;
  bool has_begun_ = false;
};

// Whether an environment variable leaves on what it can turn off with 0, to measure against.
inline bool switch_is_on(const char* variable) {
  const char* value = std::getenv(variable);
  const std::string text = value ? value : "";
  if (text != "" && text != "0" && text != "1") {
    throw std::runtime_error(std::string("vtp_kernels: ") + variable + " must be 0 or 1, got " +
                             text);
  }
  return text != "0";
}

// Read once: 0 makes every launch a plain one.
inline bool dependent_launch_is_on() {
  static const bool is_on = switch_is_on("VTP_DEPENDENT_LAUNCH");
  return is_on;
}

// Code of this architecture and later has clusters and dependent launches.
constexpr int kClusterArchitecture = 90;

struct LaunchOptions {
  unsigned cluster = 1;  // neighbouring blocks in x that run at the same time; they divide the grid
};

#ifdef VTP_EMULATOR

// The virtual architecture, 90 say, that the code for the current device was compiled for.
template <class Kernel>
int architecture_of(const char* /*name*/, Kernel* /*kernel*/) {
  return emulator::multiprocessor.architecture();
}

#else

// What a device grants a block, static and dynamic shared memory together, without being asked.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// A kernel on one device. What it was granted only grows: another thread may be about to use it.
struct KernelState {
  bool known = false;
  int architecture = 0;
  size_t static_shared = 0, granted_dynamic = 0;
  int clusters_at_once = -1;  // of the one size that it is launched with; -1: not asked for yet
};

struct KernelStates {
  std::mutex mutex;
  std::map<std::pair<int, const void*>, KernelState> states;  // by device and kernel
};

inline KernelStates& kernel_states() {
  static KernelStates all;
  return all;
}

// Calls f(state) with the kernel's state on the current device, which is asked for once. All of
// that may be done while a CUDA graph is captured.
template <class F>
auto with_kernel_state(const char* name, const void* kernel, const F& f) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  KernelStates& all = kernel_states();
  const std::lock_guard<std::mutex> lock(all.mutex);
  KernelState& state = all.states[{device, kernel}];
  if (!state.known) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    state.architecture = attributes.ptxVersion;
    state.static_shared = attributes.sharedSizeBytes;
    state.known = true;
  }
  return f(state);
}

inline void ask_for_dynamic_shared(const char* name, const void* kernel, size_t bytes) {
  with_kernel_state(name, kernel, [&](KernelState& state) {
    const bool default_is_enough = state.static_shared + bytes <= kDefaultSharedBytes;
    if (default_is_enough || bytes <= state.granted_dynamic) return;
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes)), name);
    state.granted_dynamic = bytes;
  });
}

// The virtual architecture, 90 say, that the code for the current device was compiled for: it says
// what the kernel does, where the device says only what it could do.
template <class Kernel>
int architecture_of(const char* name, Kernel* kernel) {
  return with_kernel_state(name, reinterpret_cast<const void*>(kernel),
                           [](const KernelState& state) { return state.architecture; });
}

// `values` have the kernel's parameter types.
template <class... Parameters>
cudaError_t launch_kernel(cudaLaunchConfig_t config, const LaunchOptions& options, bool dependent,
                          const void* kernel, Parameters... values) {
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (options.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = options.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  void* pointers[sizeof...(Parameters) + 1] = {&values..., nullptr};
  return cudaLaunchKernelExC(&config, kernel, pointers);
}

#endif

// Launches kernel(arguments...), each argument converted to the kernel's parameter type. A grid
// without blocks is no launch.
template <class... Parameters, class... Arguments>
void launch(const LaunchOptions& options, const char* name, void (*kernel)(Parameters...),
            dim3 grid, dim3 block, size_t dynamic_shared, OpStream& stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  bool dependent = stream.has_begun() && dependent_launch_is_on();
  if (dependent || options.cluster > 1) {
    const bool is_old = architecture_of(name, kernel) < kClusterArchitecture;
    if (options.cluster > 1 && is_old) {
      throw std::runtime_error(std::string("vtp_kernels: ") + name +
                               ": clusters need code for compute capability 9.0 or later");
    }
    dependent = dependent && !is_old;
  }
#ifdef VTP_EMULATOR
  emulator::launch(name, grid, block, options.cluster, dependent, dynamic_shared,
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (dynamic_shared > 0) ask_for_dynamic_shared(name, entry, dynamic_shared);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream.get());
  check(launch_kernel<Parameters...>(config, options, dependent, entry,
                                     static_cast<Parameters>(arguments)...),
        name);
#endif
  stream.begin();
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_shared, OpStream& stream, const Arguments&... arguments) {
  launch(LaunchOptions{}, name, kernel, grid, block, dynamic_shared, stream, arguments...);
}

// A kernel by itself.
template <class... Parameters, class... Arguments>
void launch(const LaunchOptions& options, const char* name, void (*kernel)(Parameters...),
            dim3 grid, dim3 block, size_t dynamic_shared, Stream stream,
            const Arguments&... arguments) {
  OpStream alone(stream);
  launch(options, name, kernel, grid, block, dynamic_shared, alone, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_shared, Stream stream, const Arguments&... arguments) {
  launch(LaunchOptions{}, name, kernel, grid, block, dynamic_shared, stream, arguments...);
}

}  // namespace vtp::cuda
