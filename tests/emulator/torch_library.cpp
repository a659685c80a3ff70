// torch.ops.vtp_kernels_emulated.*: the CUDA kernels and their bindings, with host memory for device
// memory and the emulator for the GPU. Same schemas as torch.ops.vtp_kernels.*.
#include <atomic>

#include "emulator.h"
#include "torch_ops.h"

namespace vtp {
namespace {

class HostMemory {
 public:
  explicit HostMemory(const Tensor&) {}

  bool holds(const Tensor& t) const { return t.is_cpu(); }
  std::string name() const { return "the CPU"; }

  // Outputs and workspace begin as garbage, another each time: what a kernel leaves out shows.
  Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) const {
    static std::atomic<uint64_t> made{0};
    const Tensor t = empty_strided(sizes, dtype, aoti_torch_device_type_cpu(), 0);
    emulator::fill_with_garbage(t.data_ptr(), t.numel() * t.element_size(), ++made);
    return t;
  }

  cuda::Stream stream() const { return nullptr; }
};

}  // namespace
}  // namespace vtp

STABLE_TORCH_LIBRARY(vtp_kernels_emulated, m) { vtp::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(vtp_kernels_emulated, CPU, m) {
  vtp::implement_ops<vtp::CudaKernels<vtp::HostMemory>>(m);
}
