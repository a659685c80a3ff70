// Runs a grid block by block, each CUDA thread on a fiber of its own, and refuses what would hang or
// be undefined on a GPU: barriers and warp collectives that not all threads reach alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "async_copies.h"
#include "cuda/vector_types.h"
#include "fiber.h"
#include "order.h"
#include "races.h"
#include "shared_memory.h"
#include "site.h"

namespace vtp::emulator {

constexpr unsigned kLanes = 32;

// What the running thread sees as threadIdx and so on.
struct Position {
  uint3 thread = {}, block = {};
  dim3 block_size, grid_size;
};

inline Position position;

// What a meeting is for, and where: all must come to the same one.
struct Meeting {
  const char* kind = nullptr;
  Site site;

  bool operator==(const Meeting& other) const {
    return site == other.site && std::strcmp(kind, other.kind) == 0;
  }
  std::string text() const { return std::string(kind) + " (" + site.text() + ")"; }
};

// The numbers threads bring to a barrier, counted.
struct Votes {
  int yes = 0;
  bool any = false, all = true;
};

// Threads that have come to a barrier or a warp collective wait here for the rest. Results are
// double-buffered: nobody comes to the meeting after next before all have left this one.
struct Rendezvous {
  Meeting meeting;
  unsigned arrived = 0;
  unsigned parity = 0;
};

struct Barrier : Rendezvous {
  Votes votes[2];
};

struct Warp : Rendezvous {
  static constexpr size_t kValueBytes = 64;
  alignas(64) unsigned char values[2][kLanes * kValueBytes];
  uint32_t ballot[2];
};

class Multiprocessor {
 public:
  static constexpr unsigned kMaxThreads = ReadySet::kThreads;

  // Body: a callable that runs the kernel for the running thread.
  template <class Body>
  void launch(const char* name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic_shared,
              const Body& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    call_ = [](const void* body) { (*static_cast<const Body*>(body))(); };
    body_ = &body;
    if (cluster != 1) throw std::runtime_error(kPrefix + name + ": clusters are not emulated");
    run(name, grid, block, dynamic_shared);
  }

  void set_order(Order order, uint64_t seed) {
    order_ = order;
    random_ = Random(seed);
  }

  Order order() const { return order_; }

  // The virtual architecture that all kernels count as compiled for.
  void set_architecture(int architecture) { architecture_ = architecture; }
  int architecture() const { return architecture_; }

  // Shared memory a block may have, both kinds together.
  void set_shared_limit(size_t bytes) { shared_limit_ = bytes; }
  size_t shared_limit() const { return shared_limit_; }

  const std::map<std::string, uint64_t>& launches() const { return launches_; }
  uint64_t switches() const { return switches_; }

  // ---- What kernels call --------------------------------------------------------------------

  void* shared_object(int id, const std::type_info& type, size_t bytes, size_t alignment) {
    const Untracked untracked;
    void* object = shared_.object(id, type, bytes, alignment);
    if (shared_.static_bytes() > SharedMemory::kStaticLimit) {
      fail("has more than 48 KB of static shared memory");
    }
    check_shared_total();
    return object;
  }

  unsigned char* dynamic_shared() const { return shared_.dynamic(); }

  // To shared memory, zeros from null.
  void copy_async(void* target, const void* source, const void* place) {
    const Untracked untracked;
    if (source) untracked.note(Access::read, source, AsyncCopies::kBytes, place);
    untracked.note(Access::write, target, AsyncCopies::kBytes, place);
    current_->copies.issue(target, source);
  }

  void commit_copies() {
    const Untracked untracked;
    current_->copies.commit();
  }

  void wait_copies(size_t pending, const void* place) {
    const Untracked untracked;
    current_->copies.wait(pending, [&](const void* target, size_t bytes) {
      untracked.note(Access::write, target, bytes, place);
    });
  }

  // Waits for all threads of the block; their votes counted.
  Votes barrier(const char* kind, bool vote, Site site) {
    const Untracked untracked;
    Votes& votes = barrier_.votes[barrier_.parity];
    come_to(barrier_, {kind, site});
    if (barrier_.arrived == 1) votes = {};
    votes.yes += vote;
    votes.any |= vote;
    votes.all &= vote;
    if (barrier_.arrived == threads_) {
      leave(barrier_);
      races::barrier(site, std::strcmp(kind, "__syncthreads") != 0);
      ready_.add_first(threads_);
    }
    wait();
    return votes;
  }

  // Waits for all lanes of the warp; the values they brought.
  template <class T>
  const T* exchange(const char* kind, unsigned mask, const T& value, Site site) {
    static_assert(sizeof(T) <= Warp::kValueBytes && std::is_trivially_copyable_v<T>);
    const Untracked untracked;
    Warp& warp = warps_[current_->number / kLanes];
    auto* values = reinterpret_cast<T*>(warp.values[warp.parity]);
    std::memcpy(values + current_->number % kLanes, &value, sizeof value);
    meet(warp, {kind, site}, mask, false);
    return values;
  }

  // The same for a bit each.
  uint32_t ballot(const char* kind, unsigned mask, bool vote, Site site) {
    const Untracked untracked;
    Warp& warp = warps_[current_->number / kLanes];
    uint32_t& ballot = warp.ballot[warp.parity];
    if (warp.arrived == 0) ballot = 0;
    ballot |= uint32_t{vote} << current_->number % kLanes;
    meet(warp, {kind, site}, mask, false);
    return ballot;
  }

  // Waits for all lanes of the warp. Alone among the collectives this one orders memory accesses.
  void warp_barrier(const char* kind, unsigned mask, Site site) {
    const Untracked untracked;
    meet(warps_[current_->number / kLanes], {kind, site}, mask, true);
  }

  unsigned lane() const { return current_->number % kLanes; }

  // Where order among threads may show, another may go first.
  void preempt() {
    if (order_ != Order::random) return;
    const Untracked untracked;
    ready_.add(current_->number);
    wait();
  }

  // Ends the launch from within a thread.
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(context() + ", " + thread_name(*current_) + ": " + what);
  }

 private:
  struct Thread {
    Stack stack;
    Fiber fiber;
    unsigned number = 0;
    uint3 index = {};
    bool exited = false;
    const Rendezvous* waits_at = nullptr;
    AsyncCopies copies;
  };

  inline static const std::string kPrefix = "emulator: kernel ";

  // ---- The host's side ----------------------------------------------------------------------

  void run(const char* name, dim3 grid, dim3 block, size_t dynamic_shared) {
    name_ = name;
    threads_ = block.x * block.y * block.z;
    dynamic_bytes_ = dynamic_shared;
    position.grid_size = grid;
    position.block_size = block;
    check_configuration();
    make_threads();
    ++launches_[name];
    races::begin_launch();
    host_.adopt_thread();
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (const uint64_t i : block_sequence(blocks, order_, random_)) {
      position.block = {static_cast<unsigned>(i % grid.x),
                        static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
      run_block();
    }
    shared_.clear();
  }

  void run_block() {
    races::begin_block(warps_.size());
    shared_.begin_block(dynamic_bytes_);
    static_cast<Rendezvous&>(barrier_) = {};
    for (Warp& warp : warps_) static_cast<Rendezvous&>(warp) = {};
    for (unsigned i = 0; i < threads_; ++i) {
      all_threads_[i]->exited = false;
      all_threads_[i]->copies.clear();
    }
    exited_ = 0;
    ready_.clear();
    ready_.add_first(threads_);
    go_on(host_);
    if (failure_.empty() && exited_ < threads_) failure_ = deadlock();
    for (const std::string& mistake : {shared_.damage(), races::found()}) {
      if (failure_.empty() && !mistake.empty()) failure_ = context() + ": " + mistake;
    }
    if (!failure_.empty()) abandon();
  }

  // Threads that were cut short begin anew next time; what is on their stacks is not destroyed.
  [[noreturn]] void abandon() {
    for (auto& thread : all_threads_) prepare(*thread);
    shared_.clear();
    const std::string failure = std::move(failure_);
    failure_.clear();
    throw std::runtime_error(failure);
  }

  void make_threads() {
    while (all_threads_.size() < threads_) {
      all_threads_.push_back(std::make_unique<Thread>());
      all_threads_.back()->number = all_threads_.size() - 1;
      prepare(*all_threads_.back());
    }
    warps_.resize((threads_ + kLanes - 1) / kLanes);
    const dim3 size = position.block_size;
    for (unsigned i = 0; i < threads_; ++i) {
      all_threads_[i]->index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    }
  }

  void prepare(Thread& thread);

  void check_configuration() const {
    const dim3 grid = position.grid_size, block = position.block_size;
    const auto complain = [&](const char* what) {
      throw std::runtime_error(kPrefix + name_ + ": " + what);
    };
    if (threads_ < 1 || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 ||
        uint64_t{block.x} * block.y * block.z > kMaxThreads) {
      complain("a block has 1 to 1024 threads, 64 in z");
    }
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) complain("a grid has at least one block");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
      complain("a grid has at most 2^31 - 1 blocks in x, 65535 in y and z");
    }
    if (dynamic_bytes_ > shared_limit_) complain("more shared memory than a block may have");
  }

  // A GPU grants 48 KB, static and dynamic, unless asked for more, as csrc/vtp/launch.cuh does where
  // there is a dynamic part; the static part is refused by nvcc.
  void check_shared_total() const {
    const size_t total = shared_.static_bytes() + dynamic_bytes_;
    if (total > shared_limit_) {
      fail("has more shared memory than a block may have: " + std::to_string(total) + " of " +
           std::to_string(shared_limit_) + " bytes");
    }
  }

  // ---- A thread's side ----------------------------------------------------------------------

  [[noreturn]] void thread_main() {
    current_->fiber.arrive();
    for (;;) {
      try {
        races::track(true);
        call_(body_);
      } catch (const std::exception& error) {
        failure_ = error.what();
        if (failure_.rfind(kPrefix, 0) != 0) failure_ = context() + ": " + failure_;
      } catch (...) {
        failure_ = context() + ": an exception that is no std::exception";
      }
      races::track(false);
      current_->exited = true;
      ++exited_;
      wait();
    }
  }

  void meet(Warp& warp, const Meeting& meeting, unsigned mask, bool orders_memory) {
    if (mask != ~0u) fail(meeting.text() + " does not name all 32 lanes");
    come_to(warp, meeting);
    if (warp.arrived == kLanes) {
      leave(warp);
      if (orders_memory) races::warp_barrier(current_->number / kLanes, meeting.site);
      ready_.add_warp(current_->number / kLanes);
    }
    wait();
  }

  void come_to(Rendezvous& rendezvous, const Meeting& meeting) {
    if (rendezvous.arrived++ == 0) {
      rendezvous.meeting = meeting;
    } else if (!(rendezvous.meeting == meeting)) {
      fail("came to " + meeting.text() + " while others wait at " + rendezvous.meeting.text());
    }
    current_->waits_at = &rendezvous;
  }

  void leave(Rendezvous& rendezvous) {
    rendezvous.arrived = 0;
    rendezvous.parity ^= 1;
  }

  void wait() { go_on(current_->fiber); }

  // From the running fiber to the next thread that can run, or else to the host.
  void go_on(Fiber& running) {
    ++switches_;
    if (ready_.empty() || !failure_.empty()) {
      if (&running != &host_) running.switch_to(host_);
      return;
    }
    const unsigned next = order_ == Order::forward   ? ready_.take_first()
                          : order_ == Order::reverse ? ready_.take_last()
                                                     : ready_.take_from(random_.below(threads_));
    current_ = all_threads_[next].get();
    position.thread = current_->index;
    races::run(next, current_->stack.bottom(), Stack::kBytes);
    if (&current_->fiber != &running) running.switch_to(current_->fiber);
  }

  // ---- Words --------------------------------------------------------------------------------

  static std::string text(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
  }

  std::string context() const {
    return kPrefix + name_ + ", block " + text(position.block);
  }

  static std::string thread_name(const Thread& thread) { return "thread " + text(thread.index); }

  std::string deadlock() const {
    std::string text = context() + ": threads wait for others that will not come: ";
    if (barrier_.arrived) {
      text += std::to_string(barrier_.arrived) + " at " + barrier_.meeting.text() + ", ";
    }
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      if (!warps_[warp].arrived) continue;
      text += std::to_string(warps_[warp].arrived) + " of warp " + std::to_string(warp) + " at " +
              warps_[warp].meeting.text() + ", ";
    }
    return text + std::to_string(exited_) + " of " + std::to_string(threads_) + " have returned";
  }

  std::mutex mutex_;
  Order order_ = order_of_environment();
  Random random_{seed_of_environment()};
  size_t shared_limit_ = 64 << 10;  // of compute capability 7.5, the least of all
  int architecture_ = 90;
  std::map<std::string, uint64_t> launches_;  // by kernel
  uint64_t switches_ = 0;

  // The launch.
  const char* name_ = "";
  void (*call_)(const void*) = nullptr;
  const void* body_ = nullptr;
  unsigned threads_ = 0;
  size_t dynamic_bytes_ = 0;

  // The block.
  Fiber host_;
  std::vector<std::unique_ptr<Thread>> all_threads_;
  Thread* current_ = nullptr;
  ReadySet ready_;
  unsigned exited_ = 0;
  Barrier barrier_;
  std::vector<Warp> warps_;
  SharedMemory shared_;
  std::string failure_;
};

inline Multiprocessor multiprocessor;

inline void Multiprocessor::prepare(Thread& thread) {
  thread.fiber.prepare(thread.stack, thread.number, [] { multiprocessor.thread_main(); });
}

}  // namespace vtp::emulator
