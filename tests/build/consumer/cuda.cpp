// Tells which GPUs the CUDA kernels are for, what a call needs, and why this device has no image.
#include <vtp_kernels/cuda_ops.h>

#include <cstdio>

int main() {
  vtp::SelectTopk arguments;
  arguments.scores = {nullptr, vtp::DType::f32, {8, 100000}, {100000, 1}};
  arguments.k = arguments.capacity = 64;
  const vtp::cuda::Image image = vtp::cuda::image(0);
  std::printf("for %s, workspace %s, device 0: %s\n", vtp::cuda::architectures(),
              vtp::cuda::select_topk_workspace(arguments) % 256 ? "misaligned" : "aligned",
              image.why ? "none" : "an image");
}
