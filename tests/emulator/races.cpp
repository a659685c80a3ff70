// Finds data races: two accesses to a byte, one of them a write, by threads that nothing orders.
//
// CUDA as used here has few ways to order threads, so the answer is exact for the inputs run, and
// the same in every thread order: __syncthreads orders all threads of a block, __syncwarp the lanes
// of a warp, a launch all that came before it; shuffles and votes order nothing, and neither do
// blocks, but for those of a cluster. Time is a counter that each of these events advances: an
// access is ordered before the present if it is older than the last event that both threads took
// part in.
// A cluster barrier is no such event, since threads go on between cluster_arrive and cluster_wait:
// what a thread does after its n-th arrival is ordered before what others do once they have waited
// for barrier n + 1. And a dependent launch comes after those before it in a thread that has waited
// for them.
// Products of a warpgroup read shared memory in an order of their own: a write comes before them only
// if the thread that wrote then fenced it, and then came to a barrier.
#include "races.h"

#include "pages.h"

#ifdef VTP_EMULATOR_RACES

#include <algorithm>
#include <cstdint>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

namespace vtp::emulator {
namespace {

constexpr unsigned kLanes = 32;

// The latest access of one kind to a byte. Of others since the last event that would order them it
// is enough to know where they came from.
struct Latest {
  uint32_t time = 0;  // 0: never
  uint32_t place = 0;
  uint32_t arrivals = 0;  // of the thread, at cluster barriers
  uint16_t thread = 0;
  uint8_t block = 0;  // of the cluster
  bool other_lanes = false, other_warps = false, other_blocks = false, other_clusters = false;
};

struct Cell {
  Latest latest[3];  // by Access
};

using Shadow = Pages<Cell, 256>;  // of all bytes the launch has touched

struct State {
  Shadow shadow;
  std::string found;
  uint32_t clock = 0;
  // When the current one began or the last one was.
  uint32_t plain_launch = 0, launch = 0, cluster = 0;
  std::vector<uint32_t> barriers;  // of each block
  std::vector<uint32_t> warp_barriers;
  std::vector<uint32_t> fences;     // of each thread, its last
  std::vector<uint32_t> published;  // the same before the block's last barrier
  unsigned warps = 0;               // of a block
  std::map<std::pair<std::string_view, int>, bool> sites;  // of barriers; whether to be ignored
  std::string ignored;  // which of them
  // The running thread.
  unsigned block = 0, thread = 0, arrivals = 0, waits = 0;
  bool after_earlier_kernels = true;

  unsigned warp() const { return thread / kLanes; }
  unsigned number(unsigned block, unsigned thread) const { return block * warps * kLanes + thread; }
  uint32_t barrier() const { return barriers[block]; }
  uint32_t& warp_barrier() { return warp_barriers[block * warps + warp()]; }
};

State state;

// ---- Order --------------------------------------------------------------------------------------

// Whether a cluster barrier lies between an access of this cluster and now.
bool is_before_cluster_barrier(const Latest& latest) { return latest.arrivals < state.waits; }

// Whether the running thread's access now is in no order with an earlier one.
bool is_unordered(const Latest& latest) {
  if (latest.time < state.launch) {
    return latest.time >= state.plain_launch && !state.after_earlier_kernels;
  }
  if (latest.other_clusters || latest.time < state.cluster) return true;
  if (is_before_cluster_barrier(latest)) return false;
  if (latest.other_blocks || latest.block != state.block) return true;
  if (latest.time < state.barrier()) return false;
  if (latest.other_warps || latest.thread / kLanes != state.warp()) return true;
  if (latest.time < state.warp_barrier()) return false;
  return latest.other_lanes || latest.thread != state.thread;
}

void update(Latest& latest, uint32_t place) {
  if (latest.time < state.launch) {
    latest = {};
  } else if (latest.time < state.cluster) {
    latest = {};
    latest.other_clusters = true;
  } else if (is_before_cluster_barrier(latest)) {
    const bool other_clusters = latest.other_clusters;
    latest = {};
    latest.other_clusters = other_clusters;
  } else if (latest.block != state.block) {
    latest.other_blocks = true;
  } else if (latest.time < state.barrier()) {
    latest.other_warps = latest.other_lanes = false;
  } else if (latest.thread / kLanes != state.warp()) {
    latest.other_warps = true;
  } else if (latest.time < state.warp_barrier()) {
    latest.other_lanes = false;
  } else if (latest.thread != state.thread) {
    latest.other_lanes = true;
  }
  latest.time = state.clock;
  latest.block = static_cast<uint8_t>(state.block);
  latest.thread = static_cast<uint16_t>(state.thread);
  latest.arrivals = std::max(latest.arrivals, state.arrivals);
  latest.place = place;
}

// ---- Words --------------------------------------------------------------------------------------

constexpr uint32_t kEndOfBlock = 0;  // no place that returns from a call

std::string source_of(uint32_t place) {
  return place == kEndOfBlock ? "at the end of its block" : accesses::source(place);
}

std::string text_of(const std::pair<std::string_view, int>& site) {
  return std::string(site.first) + ":" + std::to_string(site.second);
}

const char* verb(Access access) {
  return access == Access::read    ? "reads"
         : access == Access::write ? "writes"
                                   : "atomically changes";
}

void report(Access access, uint32_t place, Access other, const Latest& latest) {
  if (!state.found.empty()) return;
  const std::string first = "a data race: thread " + std::to_string(state.thread) + " " +
                            verb(access) + " (" + source_of(place) + ") what ";
  const std::string second = std::string(verb(other)) + " (" + source_of(latest.place) + "), and ";
  if (latest.time < state.launch) {
    state.found = first + "an earlier kernel " + second + "has not waited for it";
    return;
  }
  const bool same_block = latest.time >= state.cluster && latest.block == state.block;
  state.found = first + "thread " + std::to_string(latest.thread) +
                (same_block ? " " : " of another block ") + second + "nothing orders them";
}

// Whether products that read what was last written might not see it.
bool is_unfenced(const Latest& written) {
  if (written.time < state.cluster) return false;  // never, by this cluster
  return written.other_warps || written.other_lanes ||
         written.time >= state.published[state.number(written.block, written.thread)];
}

void report_unfenced(uint32_t place, const Latest& written) {
  if (!state.found.empty()) return;
  state.found = "a data race: a product of thread " + std::to_string(state.thread) + " reads (" +
                source_of(place) + ") what thread " + std::to_string(written.thread) + " writes (" +
                source_of(written.place) + "), and has not fenced for it before a barrier";
}

void note(Access access, Cell& cell, uint32_t place) {
  // Reads agree with reads, atomics with atomics.
  for (const Access other : {Access::read, Access::write, Access::atomic}) {
    if (access == other && access != Access::write) continue;
    const Latest& latest = cell.latest[static_cast<int>(other)];
    if (is_unordered(latest)) report(access, place, other, latest);
  }
  update(cell.latest[static_cast<int>(access)], place);
}

}  // namespace

// ---- What the emulator tells --------------------------------------------------------------------

namespace races {

void begin_launch(bool dependent) {
  state.found.clear();
  state.launch = ++state.clock;
  if (dependent) return;
  state.shadow.clear();
  state.plain_launch = state.launch;
}

void begin_cluster(unsigned blocks, unsigned warps) {
  state.cluster = ++state.clock;
  state.warps = warps;
  state.barriers.assign(blocks, state.clock);
  state.warp_barriers.assign(blocks * warps, state.clock);
  state.fences.assign(blocks * warps * kLanes, 0);
  state.published = state.fences;
}

bool orders(const Site& site) {
  const auto [at, is_new] = state.sites.try_emplace({site.file, site.line}, false);
  if (is_new) at->second = text_of(at->first) == state.ignored;
  return !at->second;
}

void barrier(unsigned block, const Site& site, bool is_vote) {
  if (!is_vote && !orders(site)) return;
  state.barriers[block] = ++state.clock;
  const auto first = state.fences.begin() + state.number(block, 0);
  std::copy(first, first + state.warps * kLanes, state.published.begin() + state.number(block, 0));
}

void fence_operands(const Site& site) {
  if (orders(site)) state.fences[state.number(state.block, state.thread)] = ++state.clock;
}

void warp_barrier(const Site& site) {
  if (orders(site)) state.warp_barrier() = ++state.clock;
}

std::vector<std::string> barriers() {
  std::vector<std::string> sites;
  for (const auto& [site, ignored] : state.sites) sites.push_back(text_of(site));
  return sites;
}

void forget_barriers() { state.sites.clear(); }

void ignore_barrier(const std::string& wanted) {
  state.ignored = wanted;
  for (auto& [site, ignored] : state.sites) ignored = text_of(site) == wanted;
}

void run(unsigned block, unsigned thread) {
  state.block = block;
  state.thread = thread;
}

void order(unsigned arrivals, unsigned waits, bool after_earlier_kernels) {
  state.arrivals = arrivals;
  state.waits = waits;
  state.after_earlier_kernels = after_earlier_kernels;
}

void end_of_block(const void* data, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Cell& cell = state.shadow.at(at);
    for (const Access other : {Access::read, Access::write, Access::atomic}) {
      const Latest& latest = cell.latest[static_cast<int>(other)];
      const bool is_foreign = latest.other_blocks || latest.block != state.block;
      if (is_foreign && is_unordered(latest)) report(Access::write, kEndOfBlock, other, latest);
    }
    cell = {};
    update(cell.latest[static_cast<int>(Access::write)], kEndOfBlock);
  }
}

void forget(const void* data, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = first; at < first + bytes; ++at) state.shadow.at(at) = {};
}

void note(Access access, uintptr_t first, size_t bytes, uint32_t place) {
  for (uintptr_t at = first; at < first + bytes; ++at) {
    emulator::note(access, state.shadow.at(at), place);
  }
}

void note_operand(uintptr_t first, size_t bytes, uint32_t place) {
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Cell& cell = state.shadow.at(at);
    const Latest& written = cell.latest[static_cast<int>(Access::write)];
    if (is_unfenced(written)) report_unfenced(place, written);
    emulator::note(Access::read, cell, place);
  }
}

std::string found() { return state.found; }

}  // namespace races
}  // namespace vtp::emulator

#endif
