// Runs a grid cluster by cluster, most of one block, each CUDA thread on a fiber of its own, and
// refuses what would hang or be undefined on a GPU: barriers and warp collectives that not all
// threads reach alike, and shared memory of a block that may not have begun or may have ended.
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
#include "products.h"
#include "races.h"
#include "shared_memory.h"
#include "site.h"
#include "traffic.h"

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

// Four warps that multiply together.
struct Warpgroup : Rendezvous {
  static constexpr unsigned kThreads = 4 * kLanes;
  std::shared_ptr<Product> product;  // of the current or the last meeting
};

// One of the blocks that run at a time. Its threads have consecutive numbers, whole warps of them.
struct Block {
  unsigned rank = 0;  // in the cluster
  uint3 index = {};
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  SharedMemory shared;
  unsigned fenced = 0;         // threads, since the last barrier
  unsigned exited = 0;         // threads
  unsigned mapped_before = 0;  // the cluster barrier before which others have mapped its memory
};

class Multiprocessor {
 public:
  static constexpr unsigned kMaxThreads = 1024, kMaxBlocks = 8;
  static constexpr int kProductArchitecture = 90;  // has products of a warpgroup, and no other
  static_assert(kMaxThreads * kMaxBlocks <= ReadySet::kThreads);

  // Body: a callable that runs the kernel for the running thread.
  template <class Body>
  void launch(const char* name, dim3 grid, dim3 block, unsigned cluster, bool dependent,
              size_t dynamic_shared, const Body& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    call_ = [](const void* body) { (*static_cast<const Body*>(body))(); };
    body_ = &body;
    is_dependent_ = dependent;
    run(name, grid, block, cluster, dynamic_shared);
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
    SharedMemory& shared = block().shared;
    void* object = shared.object(id, type, bytes, alignment);
    if (shared.static_bytes() > SharedMemory::kStaticLimit) {
      fail("has more than 48 KB of static shared memory");
    }
    check_shared_total(shared);
    return object;
  }

  unsigned char* dynamic_shared() const {
    const Untracked untracked;
    return block().shared.dynamic();
  }

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
      untracked.note_landing(target, bytes, place);
    });
  }

  // Waits for all threads of the block; their votes counted.
  Votes barrier(const char* kind, bool vote, Site site) {
    const Untracked untracked;
    Barrier& barrier = block().barrier;
    Votes& votes = barrier.votes[barrier.parity];
    come_to(barrier, {kind, site});
    if (barrier.arrived == 1) votes = {};
    votes.yes += vote;
    votes.any |= vote;
    votes.all &= vote;
    if (barrier.arrived == threads_) {
      leave(barrier);
      end_fences(block());
      traffic::barrier(block().rank);
      races::barrier(block().rank, site, std::strcmp(kind, "__syncthreads") != 0);
      ready_.add_range(block().rank * slots_, threads_);
    }
    wait();
    return votes;
  }

  unsigned cluster_rank() const {
    const Untracked untracked;
    return block().rank;
  }
  unsigned cluster_blocks() const { return cluster_; }

  // Comes to the next cluster barrier without waiting for it.
  void cluster_arrive(Site site) {
    const Untracked untracked;
    Thread& thread = *current_;
    const Meeting meeting = {"cluster_arrive", site};
    if (thread.arrivals > thread.waits) fail(meeting.text() + " for a second time");
    come_to(cluster_barrier_, meeting);
    ++thread.arrivals;
    if (cluster_barrier_.arrived == threads_ * cluster_) {
      leave(cluster_barrier_);
      ++cluster_barriers_;
      traffic::cluster_barrier();
      for (const unsigned waiting : cluster_waiting_) ready_.add(waiting);
      cluster_waiting_.clear();
    }
    tell_order();
  }

  // Waits until all threads of the cluster have come to the barrier that this one has come to.
  void cluster_wait(Site site) {
    const Untracked untracked;
    Thread& thread = *current_;
    if (thread.arrivals == thread.waits) {
      fail("cluster_wait (" + site.text() + ") without cluster_arrive");
    }
    if (cluster_barriers_ < thread.arrivals) {
      cluster_waiting_.push_back(thread.number);
      wait();
    } else {
      preempt();
    }
    thread.waits = thread.arrivals;
    if (races::orders(site)) thread.ordered = thread.waits;
    tell_order();
  }

  // The same place in the shared memory of another block of the cluster.
  unsigned char* map_shared_rank(const void* place, unsigned rank) {
    const Untracked untracked;
    if (rank >= cluster_) {
      fail("maps shared memory of block " + std::to_string(rank) + " of a cluster of " +
           std::to_string(cluster_));
    }
    Block& other = *blocks_[rank];
    unsigned char* mapped = block().shared.same_place(place, other.shared);
    if (!mapped) fail("maps what is no shared memory of its own");
    if (rank == block().rank) return mapped;
    const std::string whose = "maps shared memory of block " + std::to_string(rank) + ", which ";
    if (current_->waits == 0) fail(whose + "may not have begun: there was no cluster_wait yet");
    if (other.exited == threads_) fail(whose + "has ended");
    other.mapped_before = std::max(other.mapped_before, current_->arrivals + 1);
    return mapped;
  }

  // Waits for all lanes of the warp; the values they brought.
  template <class T>
  const T* exchange(const char* kind, unsigned mask, const T& value, Site site) {
    static_assert(sizeof(T) <= Warp::kValueBytes && std::is_trivially_copyable_v<T>);
    const Untracked untracked;
    Warp& warp = this->warp();
    auto* values = reinterpret_cast<T*>(warp.values[warp.parity]);
    std::memcpy(values + current_->number % kLanes, &value, sizeof value);
    meet(warp, {kind, site}, mask, false);
    return values;
  }

  // The same for a bit each.
  uint32_t ballot(const char* kind, unsigned mask, bool vote, Site site) {
    const Untracked untracked;
    Warp& warp = this->warp();
    uint32_t& ballot = warp.ballot[warp.parity];
    if (warp.arrived == 0) ballot = 0;
    ballot |= uint32_t{vote} << current_->number % kLanes;
    meet(warp, {kind, site}, mask, false);
    return ballot;
  }

  // Waits for all lanes of the warp. Alone among the collectives this one orders memory accesses.
  void warp_barrier(const char* kind, unsigned mask, Site site) {
    const Untracked untracked;
    meet(warp(), {kind, site}, mask, true);
  }

  // ---- Products of a warpgroup ----

  // What the hardware calls a place in shared memory.
  uint32_t shared_address(const void* place) const {
    const Untracked untracked;
    const uint32_t address = block().shared.address(place);
    if (address == SharedMemory::kNoAddress) fail("an operand is no shared memory of the block");
    return address;
  }

  // What the thread has written is published by the next barrier, if all threads have fenced.
  void fence_operands(Site site) {
    const Untracked untracked;
    Thread& thread = *current_;
    if (!thread.fenced) ++block().fenced;
    thread.fenced = true;
    races::fence_operands(site);
  }

  void begin_products(Site site) {
    const Untracked untracked;
    meet(warp(), {"begin_products", site}, ~0u, false);
    current_->products.begin();
  }

  void wgmma(float* sums, unsigned count, unsigned columns, uint64_t a, uint64_t b,
             bool accumulate, WidenElement widen, Site site, const void* place) {
    const Untracked untracked;
    const unsigned thread = current_->number % slots_;
    const auto product = meet_to_multiply(columns, a, b, accumulate, widen, {"wgmma", site});
    const std::string complaint = current_->products.issue(product, sums, count);
    if (!complaint.empty()) fail(complaint);
    note_operands(*product, thread % kLanes == 0, untracked, place);
    request_operands(*product, thread % Warpgroup::kThreads, untracked, place);
  }

  void commit_products(Site site) {
    const Untracked untracked;
    meet(warp(), {"commit_products", site}, ~0u, false);
    current_->products.commit();
  }

  void wait_products(Site site, const void* place) {
    const Untracked untracked;
    meet(warp(), {"wait_products", site}, ~0u, false);
    const unsigned thread = current_->number % slots_ % Warpgroup::kThreads;
    current_->products.for_committed([&](const Product& product) {
      if (thread % kLanes == 0) check_operands(product, "is changed while a product runs");
      note_operands(product, thread % kLanes == 0, untracked, place);
    });
    const std::string complaint = current_->products.wait(thread);
    if (!complaint.empty()) fail(complaint);
  }

  // In a dependent launch: from here on the thread may touch what earlier kernels wrote.
  void await_earlier_kernels(Site site) {
    const Untracked untracked;
    Thread& thread = *current_;
    thread.awaited = true;
    if (races::orders(site)) thread.ordered_after_earlier = true;
    tell_order();
  }

  unsigned lane() const {
    const Untracked untracked;
    return current_->number % kLanes;
  }

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
    Block* block = nullptr;
    uint3 index = {};
    // Cluster barriers it has come to, and waited for; the last of these that orders memory accesses.
    unsigned arrivals = 0, waits = 0, ordered = 0;
    // Whether it has waited for earlier kernels, and whether that orders memory accesses.
    bool awaited = false, ordered_after_earlier = false;
    AsyncCopies copies;
    RunningProducts products;
    bool fenced = false;  // since the block's last barrier
  };

  inline static const std::string kPrefix = "emulator: kernel ";

  // ---- The host's side ----------------------------------------------------------------------

  void run(const char* name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic_shared) {
    name_ = name;
    threads_ = block.x * block.y * block.z;
    slots_ = (threads_ + kLanes - 1) / kLanes * kLanes;
    cluster_ = cluster;
    dynamic_bytes_ = dynamic_shared;
    position.grid_size = grid;
    position.block_size = block;
    check_configuration();
    make_blocks();
    ++launches_[name];
    races::begin_launch(is_dependent_);
    traffic::begin_launch(name, uint64_t{grid.x} * grid.y * grid.z, threads_);
    for (auto& block : blocks_) {  // kernels read what other lanes brought
      traffic::ignore(block->warps.data(), block->warps.size() * sizeof(Warp));
    }
    host_.adopt_thread();
    const unsigned row = grid.x / cluster;
    const uint64_t clusters = uint64_t{row} * grid.y * grid.z;
    for (const uint64_t i : cluster_sequence(clusters, order_, random_)) {
      for (unsigned rank = 0; rank < cluster; ++rank) {
        blocks_[rank]->index = {static_cast<unsigned>(i % row) * cluster + rank,
                                static_cast<unsigned>(i / row % grid.y),
                                static_cast<unsigned>(i / row / grid.y)};
      }
      run_cluster();
    }
    for (auto& block : blocks_) block->shared.clear();
    traffic::end_launch();
  }

  void run_cluster() {
    races::begin_cluster(cluster_, slots_ / kLanes);
    traffic::begin_cluster(cluster_, slots_ / kLanes);
    static_cast<Rendezvous&>(cluster_barrier_) = {};
    cluster_barriers_ = 0;
    cluster_waiting_.clear();
    exited_ = 0;
    ready_.clear();
    for (unsigned rank = 0; rank < cluster_; ++rank) begin_block(*blocks_[rank]);
    go_on(host_);
    if (failure_.empty() && exited_ < threads_ * cluster_) failure_ = deadlock();
    for (unsigned rank = 0; rank < cluster_; ++rank) {
      const std::string damage = blocks_[rank]->shared.damage();
      if (failure_.empty() && !damage.empty()) failure_ = context(*blocks_[rank]) + ": " + damage;
    }
    const std::string race = races::found();
    if (failure_.empty() && !race.empty()) {
      const std::string where = context(*blocks_[0]) + (cluster_ == 1 ? "" : " or its cluster");
      failure_ = where + ": " + race;
    }
    if (!failure_.empty()) abandon();
    traffic::end_cluster();
  }

  void begin_block(Block& block) {
    block.shared.begin_block(dynamic_bytes_, ++begun_);
    static_cast<Rendezvous&>(block.barrier) = {};
    for (Warp& warp : block.warps) static_cast<Rendezvous&>(warp) = {};
    for (Warpgroup& group : block.warpgroups) group = {};
    block.exited = block.mapped_before = block.fenced = 0;
    const unsigned first = block.rank * slots_;
    for (unsigned i = 0; i < threads_; ++i) {
      Thread& thread = *all_threads_[first + i];
      thread.arrivals = thread.waits = thread.ordered = 0;
      thread.awaited = thread.ordered_after_earlier = !is_dependent_;
      thread.copies.clear();
      thread.products.clear();
      thread.fenced = false;
    }
    ready_.add_range(first, threads_);
  }

  // Threads that were cut short begin anew next time; what is on their stacks is not destroyed.
  [[noreturn]] void abandon() {
    for (auto& thread : all_threads_) prepare(*thread);
    for (auto& block : blocks_) block->shared.clear();
    const std::string failure = std::move(failure_);
    failure_.clear();
    throw std::runtime_error(failure);
  }

  void make_blocks() {
    while (blocks_.size() < cluster_) {
      blocks_.push_back(std::make_unique<Block>());
      blocks_.back()->rank = blocks_.size() - 1;
    }
    while (all_threads_.size() < slots_ * cluster_) {
      all_threads_.push_back(std::make_unique<Thread>());
      all_threads_.back()->number = all_threads_.size() - 1;
      prepare(*all_threads_.back());
    }
    const dim3 size = position.block_size;
    for (unsigned rank = 0; rank < cluster_; ++rank) {
      blocks_[rank]->warps.resize(slots_ / kLanes);
      blocks_[rank]->warpgroups.resize(slots_ / Warpgroup::kThreads);
      for (unsigned i = 0; i < threads_; ++i) {
        Thread& thread = *all_threads_[rank * slots_ + i];
        thread.block = blocks_[rank].get();
        thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      }
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
    if (cluster_ < 1 || cluster_ > kMaxBlocks) complain("a cluster has 1 to 8 blocks");
    if (grid.x % cluster_ != 0) complain("a grid must be whole clusters");
    if (dynamic_bytes_ > shared_limit_) complain("more shared memory than a block may have");
  }

  // A GPU grants 48 KB, static and dynamic, unless asked for more, as csrc/vtp/launch.cuh does where
  // there is a dynamic part; the static part is refused by nvcc.
  void check_shared_total(const SharedMemory& shared) const {
    const size_t total = shared.static_bytes() + dynamic_bytes_;
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
        accesses::track(true);
        call_(body_);
        accesses::track(false);
        leave_block();
      } catch (const std::exception& error) {
        failure_ = error.what();
        if (failure_.rfind(kPrefix, 0) != 0) failure_ = context() + ": " + failure_;
      } catch (...) {
        failure_ = context() + ": an exception that is no std::exception";
      }
      accesses::track(false);
      ++exited_;
      wait();
    }
  }

  // The running thread's last act. With the last of its threads a block's shared memory is gone.
  void leave_block() {
    if (!current_->awaited) fail("ends without await_earlier_kernels, in a dependent launch");
    Block& block = this->block();
    if (++block.exited < threads_ || cluster_ == 1) return;
    if (current_->waits < block.mapped_before) {
      fail("ends, the last of a block whose shared memory another block has mapped, and no "
           "cluster_wait told it that the other is done");
    }
    block.shared.end_block();
  }

  Block& block() const { return *current_->block; }
  Warp& warp() const { return block().warps[current_->number % slots_ / kLanes]; }

  void tell_order() const {
    races::order(current_->arrivals, current_->ordered, current_->ordered_after_earlier);
  }

  void meet(Warp& warp, const Meeting& meeting, unsigned mask, bool orders_memory) {
    if (mask != ~0u) fail(meeting.text() + " does not name all 32 lanes");
    come_to(warp, meeting);
    if (warp.arrived == kLanes) {
      leave(warp);
      traffic::collective(meeting.kind);
      if (orders_memory) races::warp_barrier(meeting.site);
      ready_.add_warp(current_->number / kLanes);
    }
    wait();
  }

  void end_fences(Block& block) {
    if (block.fenced == 0) return;
    if (block.fenced == threads_) block.shared.publish();
    block.fenced = 0;
    for (unsigned i = 0; i < threads_; ++i) all_threads_[block.rank * slots_ + i]->fenced = false;
  }

  // Waits for all threads of the warpgroup, which name the same operands; these are read now.
  std::shared_ptr<const Product> meet_to_multiply(unsigned columns, uint64_t a, uint64_t b,
                                                  bool accumulate, WidenElement widen,
                                                  const Meeting& meeting) {
    if (architecture_ != kProductArchitecture) fail("there are no products of a warpgroup");
    if (threads_ % Warpgroup::kThreads != 0) fail("a block of products is whole warpgroups");
    const unsigned number = current_->number % slots_ / Warpgroup::kThreads;
    Warpgroup& group = block().warpgroups[number];
    come_to(group, meeting);
    if (group.arrived == 1) {
      group.product = std::make_shared<Product>(Product{columns, {a}, {b}, accumulate, {}, {}});
    } else if (!group.product->is_same(columns, a, b, accumulate)) {
      fail("the threads of a warpgroup name different operands");
    }
    const auto product = group.product;
    if (group.arrived == Warpgroup::kThreads) {
      leave(group);
      read_operands(*product, widen);
      ready_.add_range(block().rank * slots_ + number * Warpgroup::kThreads, Warpgroup::kThreads);
    }
    wait();
    return product;
  }

  SharedMemory::Bytes unit_at(const OperandDescriptor& operand, unsigned row, unsigned unit) const {
    return block().shared.at(operand.address(row, unit), OperandDescriptor::kUnitBytes);
  }

  // Its bytes must be those that were published.
  void check_operands(const Product& product, const char* otherwise) const {
    for (const OperandDescriptor* operand : {&product.a, &product.b}) {
      const std::string complaint = operand->complaint();
      if (!complaint.empty()) fail(complaint);
    }
    product.for_units([&](const OperandDescriptor& operand, unsigned row, unsigned unit) {
      const SharedMemory::Bytes bytes = unit_at(operand, row, unit);
      const std::string which = "row " + std::to_string(row) + " of operand " +
                                (&operand == &product.a ? "A " : "B ");
      if (!bytes.now) fail(which + "is no shared memory of the block");
      if (!bytes.published ||
          std::memcmp(bytes.now, bytes.published, OperandDescriptor::kUnitBytes) != 0) {
        fail(which + otherwise);
      }
    });
  }

  void read_operands(Product& product, WidenElement widen) const {
    check_operands(product, "was not fenced, by all threads, before a barrier");
    product.for_units([&](const OperandDescriptor& operand, unsigned row, unsigned unit) {
      uint16_t elements[OperandDescriptor::kUnitBytes / 2];
      std::memcpy(elements, unit_at(operand, row, unit).now, sizeof elements);
      std::vector<float>& to = &operand == &product.a ? product.x : product.y;
      for (const uint16_t element : elements) to.push_back(widen(element));
    });
  }

  // For a warp by one thread: any of it may read any of an operand, until it has waited.
  void note_operands([[maybe_unused]] const Product& product, [[maybe_unused]] bool is_noted,
                     [[maybe_unused]] const Untracked& untracked,
                     [[maybe_unused]] const void* place) const {
#ifdef VTP_EMULATOR_RACES
    if (!is_noted) return;
    product.for_units([&](const OperandDescriptor& operand, unsigned row, unsigned unit) {
      untracked.note_operand(unit_at(operand, row, unit).now, OperandDescriptor::kUnitBytes, place);
    });
#endif
  }

  // Every unit once a warpgroup, eight rows of a column of units by eight lanes.
  void request_operands([[maybe_unused]] const Product& product, [[maybe_unused]] unsigned thread,
                        [[maybe_unused]] const Untracked& untracked,
                        [[maybe_unused]] const void* place) const {
#ifdef VTP_EMULATOR_TRAFFIC
    const auto ask = [&](const OperandDescriptor& operand, unsigned rows) {
      for (unsigned i = thread; i < rows * OperandDescriptor::kUnits; i += Warpgroup::kThreads) {
        const unsigned row = i / 16 * OperandDescriptor::kPeriod + i % OperandDescriptor::kPeriod;
        const SharedMemory::Bytes bytes = unit_at(operand, row, i / 8 % OperandDescriptor::kUnits);
        untracked.note_request(bytes.now, OperandDescriptor::kUnitBytes, place);
      }
    };
    ask(product.a, Product::kRows);
    ask(product.b, product.columns);
#endif
  }

  void come_to(Rendezvous& rendezvous, const Meeting& meeting) {
    if (rendezvous.arrived++ == 0) {
      rendezvous.meeting = meeting;
    } else if (!(rendezvous.meeting == meeting)) {
      fail("came to " + meeting.text() + " while others wait at " + rendezvous.meeting.text());
    }
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
                                     : ready_.take_from(random_.below(slots_ * cluster_));
    current_ = all_threads_[next].get();
    position.thread = current_->index;
    position.block = block().index;
    accesses::run(block().rank, next % slots_, current_->stack.bottom(), Stack::kBytes);
    tell_order();
    if (&current_->fiber != &running) running.switch_to(current_->fiber);
  }

  // ---- Words --------------------------------------------------------------------------------

  static std::string text(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
  }

  std::string context() const { return context(block()); }

  std::string context(const Block& block) const {
    return kPrefix + name_ + ", block " + text(block.index);
  }

  static std::string thread_name(const Thread& thread) { return "thread " + text(thread.index); }

  std::string deadlock() const {
    std::string text = context() + ": threads wait for others that will not come: ";
    const auto add = [&](size_t count, const std::string& of, const Rendezvous& where) {
      if (count) text += std::to_string(count) + of + " at " + where.meeting.text() + ", ";
    };
    for (unsigned rank = 0; rank < cluster_; ++rank) {
      const Block& block = *blocks_[rank];
      const std::string of = cluster_ == 1 ? "" : " of block " + std::to_string(rank);
      add(block.barrier.arrived, of, block.barrier);
      for (size_t i = 0; i < block.warps.size(); ++i) {
        add(block.warps[i].arrived, of + " of warp " + std::to_string(i), block.warps[i]);
      }
      for (size_t i = 0; i < block.warpgroups.size(); ++i) {
        const std::string group = of + " of warpgroup " + std::to_string(i);
        add(block.warpgroups[i].arrived, group, block.warpgroups[i]);
      }
    }
    add(cluster_waiting_.size(), " of the cluster", cluster_barrier_);
    return text + std::to_string(exited_) + " of " + std::to_string(threads_ * cluster_) +
           " have returned";
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
  unsigned threads_ = 0;  // of a block
  unsigned slots_ = 0;    // the same in whole warps
  unsigned cluster_ = 1;
  bool is_dependent_ = false;
  size_t dynamic_bytes_ = 0;

  // The cluster.
  Fiber host_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Thread>> all_threads_;
  Thread* current_ = nullptr;
  ReadySet ready_;
  unsigned exited_ = 0;  // threads
  Rendezvous cluster_barrier_;
  unsigned cluster_barriers_ = 0;  // that all have come to
  std::vector<unsigned> cluster_waiting_;
  uint64_t begun_ = 0;  // blocks, of all launches
  std::string failure_;
};

inline Multiprocessor multiprocessor;

inline void Multiprocessor::prepare(Thread& thread) {
  thread.fiber.prepare(thread.stack, thread.number, [] { multiprocessor.thread_main(); });
}

}  // namespace vtp::emulator
