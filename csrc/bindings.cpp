// The extension module: the ops of torch_ops.h registered for the CPU and for CUDA, and what the
// library says about itself.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "torch_ops.h"

#ifdef VTP_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

// Weak: absent from a libtorch without CUDA, where no tensor can ever ask for it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace vtp::cpu {

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n, context);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

}  // namespace vtp::cpu

namespace vtp {
namespace {

class Cpu {
 public:
  static constexpr bool kReadsValues = true, kServesFloat64 = true;

  explicit Cpu(const Tensor&) {}

  bool holds(const Tensor& t) const { return t.is_cpu(); }
  std::string name() const { return "the CPU"; }
  Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) const {
    return empty_strided(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  }

  void run(const AttentionScores& a) const { cpu::attention_scores(a); }
  void run(const SelectTopk& a) const { cpu::select_topk(a); }
  void run(const SelectDiverse& a) const { cpu::select_diverse(a); }
  void run(const AttentionTopk& a) const {
    cpu::attention_scores(a.attention);
    cpu::select_topk(a.select);
  }
  void run(const TokenContribution& a) const { cpu::token_contribution(a); }
  void run(const PassiveAttention& a) const { cpu::passive_attention(a); }
  void run(const Inflection& a) const { cpu::inflection(a); }
  void run(const ClsInflection& a) const {
    cpu::cosine_similarity(a.similarity);
    cpu::inflection(a.inflection);
  }
  void run(const CompactRows& a) const { cpu::compact_rows(a); }
  void run_in_place(const CompactRows& a) const { cpu::compact_rows_in_place(a); }
  void run(const AssignRows& a) const { cpu::assign_rows(a); }
  void run(const MergeRows& a) const { cpu::merge_rows(a); }
};

#ifdef VTP_WITH_CUDA
// The GPU of an op's first tensor, made current while the op lasts, and torch's current stream there.
class CudaMemory {
 public:
  explicit CudaMemory(const Tensor& first) : index_(first.get_device_index()), guard_(index_) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "this libtorch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  bool holds(const Tensor& t) const { return t.is_cuda() && t.get_device_index() == index_; }
  std::string name() const { return "cuda:" + std::to_string(index_); }
  Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) const {
    return empty_strided(sizes, dtype, aoti_torch_device_type_cuda(), index_);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};
#endif

// ---- About the library --------------------------------------------------------------------------

// What the kernels run from on CUDA device `index`: {machine, ptx, ""}, as in cuda::Image, or
// {0, 0, why nothing does}.
std::tuple<int64_t, int64_t, std::string> cuda_image(int64_t index) {
#ifdef VTP_WITH_CUDA
  const cuda::Image image = cuda::image(static_cast<int>(index));
  return {image.machine, image.ptx, image.why ? image.why : ""};
#else
  (void)index;
  return {0, 0, "the native library was built without CUDA"};
#endif
}

std::string build_info() {
  std::ostringstream json;
  json << "{\"version\": \"" VTP_VERSION "\", \"libtorch\": \"" VTP_TORCH_TARGET
          "\", \"compiler\": \"" VTP_COMPILER "\", \"cpu_isa\": \"" << cpu::isa_name() << "\", \"cuda\": ";
#ifdef VTP_WITH_CUDA
  json << "\"" VTP_CUDA_COMPILER "\", \"cuda_archs\": [";
  std::istringstream names(cuda::architectures());
  std::string name;
  for (const char* comma = ""; std::getline(names, name, ','); comma = ", ") {
    json << comma << '"' << name << '"';
  }
  json << "]}";
#else
  json << "null, \"cuda_archs\": []}";
#endif
  return json.str();
}

}  // namespace
}  // namespace vtp

STABLE_TORCH_LIBRARY(vtp_kernels, m) {
  vtp::define_ops(m);
  m.def("build_info() -> str");
  m.def("cuda_image(int device) -> (int, int, str)");
}

STABLE_TORCH_LIBRARY_IMPL(vtp_kernels, CPU, m) {
  vtp::implement_ops<vtp::Cpu>(m);
}

#ifdef VTP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vtp_kernels, CUDA, m) {
  vtp::implement_ops<vtp::CudaKernels<vtp::CudaMemory>>(m);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(vtp_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&vtp::build_info));
  m.impl("cuda_image", TORCH_BOX(&vtp::cuda_image));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
