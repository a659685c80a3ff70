// Threads that stay awake between many small jobs: for a loop each of whose steps is too short to
// wake any for it.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

#include "parallel.h"

namespace vtp::cpu {
namespace {

// The leader hands out jobs; whoever is there takes units of them. The leader waits for nobody but
// those who have taken one, so nothing depends on how many come, when, or whether any does.
class Team {
 public:
  // Calls lead(team) here, or wherever parallel() begins.
  template <class F>
  static void with(const F& lead) {
    Team team;
    parallel(kSeats, kWorthWaking, [&](int64_t seat) {
      if (seat > 0) return team.help();
      const Dismissal at_last{team};
      lead(team);
    });
  }

  // f(i) for i in [0, count), each once; all are done when it returns.
  template <class F>
  void run(int64_t count, const F& f) {
    if (count <= 1) {
      if (count == 1) f(0);
      return;
    }
    call_ = [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); };
    context_ = &f;
    done_.store(0, std::memory_order_relaxed);
    ++job_;
    ticket_.store(job_ << kUnitBits | count, std::memory_order_release);
    while (take_unit()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < count;) pause(spins);
  }

 private:
  static constexpr int64_t kSeats = 16, kWorthWaking = 1 << 20, kSpins = 2000;
  static constexpr int kUnitBits = 32;  // of a ticket: units that nobody has taken; above, the job

  struct Dismissal {
    Team& team;
    ~Dismissal() { team.over_.store(true, std::memory_order_release); }
  };

  // A ticket that could be exchanged belongs to the job whose call_ is there: the leader sets
  // another only after all units of this one are done.
  bool take_unit() {
    int64_t ticket = ticket_.load(std::memory_order_acquire);
    const int64_t left = ticket & ((int64_t{1} << kUnitBits) - 1);
    if (left == 0) return false;
    if (ticket_.compare_exchange_strong(ticket, ticket - 1, std::memory_order_acq_rel)) {
      call_(context_, left - 1);
      done_.fetch_add(1, std::memory_order_release);
    }
    return true;
  }

  void help() {
    for (int64_t spins = 0; !over_.load(std::memory_order_acquire);) {
      if (take_unit()) {
        spins = 0;
      } else {
        pause(spins);
      }
    }
  }

  // Lets others run where it takes long: they may be whom we wait for.
  static void pause(int64_t& spins) {
    if (++spins > kSpins) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t job_ = 0;
  alignas(64) std::atomic<int64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> over_{false};
};

}  // namespace
}  // namespace vtp::cpu
