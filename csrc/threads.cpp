// parallel_for for C++ programs without a thread pool: some threads for each call. A program that
// defines vtp::cpu::parallel_for itself is linked with its own, for this one lies in an archive.
#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace vtp::cpu {

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t parts = std::min(cores, (n + grain - 1) / grain);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < parts; ++i) {
    others.emplace_back(body, n * i / parts, n * (i + 1) / parts, context);
  }
  body(0, n / parts, context);
  for (std::thread& other : others) other.join();
}

}  // namespace vtp::cpu
