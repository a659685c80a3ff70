// Chooses the two best of four scores.
#include <vtp_kernels/cpu/ops.h>

#include <cstdio>

int main() {
  float scores[] = {1.0f, 3.0f, 2.0f, 3.0f};
  int64_t indices[2] = {-1, -1};
  int32_t count = 0;

  vtp::SelectTopk arguments;
  arguments.scores = {scores, vtp::DType::f32, {1, 4}, {4, 1}};
  arguments.k = 2;
  arguments.capacity = 2;
  arguments.indices = indices;
  arguments.counts = &count;
  vtp::cpu::select_topk(arguments);

  std::printf("%d of 4: %d %d\n", static_cast<int>(count), static_cast<int>(indices[0]),
              static_cast<int>(indices[1]));
  return 0;
}
