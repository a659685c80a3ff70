// Threads. The library that links the kernels provides parallel_for: the extension hands the work
// to torch's own pool (so torch.set_num_threads holds), a stand-alone test may bring std::thread.
// No kernel's result depends on how the range was split.
#pragma once

#include <cstdint>

#include "ops.h"

namespace vtp::cpu {

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

namespace {

// Calls f(i) for i in [0, n). `cost` is the work of one item in units of about a nanosecond; items
// are handed out so that a thread is only woken for some 20 us of work, what waking it takes.
template <class F>
VTP_INLINE void parallel(int64_t n, int64_t cost, const F& f) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
  };
  const int64_t grain = 1 + 20000 / (cost < 1 ? 1 : cost);
  parallel_for(n, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace vtp::cpu
