// Counts what the warps of a launch ask of memory. The same on every machine, and no measurement.
//
// What is modelled
//   Request     One memory instruction of a warp: the accesses of its lanes by the same code, in the
//               same turn. A turn is how often the lane has come by since its warp last met, in a
//               shuffle, a vote or a barrier: lanes that skipped an iteration are in step again
//               after it. Structs are read and written whole. Those of 2 to 16 bytes that are
//               aligned below their size fall into pieces of half their size, of 4 bytes at most,
//               since nvcc could not load them at once; larger ones into pieces of up to 16 bytes.
//               In shared memory, where alignment is known, a lane's accesses that go on where the
//               last one ended are one request of up to 16 bytes, as nvcc has it.
//   Global      A request takes the sectors of 32 bytes that its lanes touch. Ideally it would take
//               as many as their bytes fill.
//   DRAM        Every sector comes from there once and goes there once: an L2 that starts empty and
//               has room for all that the launches of a call touch. What an earlier launch of the
//               call has written or read is in L2.
//   L1          What a block reads again it need not ask L2 for. (Counted both ways.)
//   Shared      32 banks of 4 bytes. A request of 4 bytes a lane is one group of lanes, of 8 bytes
//               two, of 16 bytes four. A group takes as many passes as the different words of its
//               fullest bank, and ideally as many as its words fill. Lanes that want the same word
//               share it, also in atomics: kernels only count with those, which the hardware does
//               for all lanes of a word at once.
//               That of another block of a cluster is no different.
//   Matrix load The rows its lanes name, 16 bytes each.
//   Product     Of a warpgroup: 16 bytes of an operand at a time, each once for all four warps, a
//               lane of eight for each of eight rows.
//   Async copy  A read of global and a write of shared memory by the lane that issues it.
//   Load phase  A stretch between two meetings in which a warp loads from global memory: round trips
//               that are likely to follow each other. Products of the tensor cores end none.
//
// What is not: what nvcc makes of a line (wider or hoisted loads, unrolled loops), latency and
// overlap, hit rates of caches that are too small, occupancy, issue slots, and the hardware's
// sharing of words between the groups of a request. Without a meeting, lanes that skip an iteration
// fall out of step. A struct in global memory that is written field by field counts as so many
// requests. Parameters, __constant__ tables and local variables are no traffic.
#include "traffic.h"

#include "pages.h"

#ifdef VTP_EMULATOR_TRAFFIC

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace vtp::emulator::traffic {
namespace {

constexpr unsigned kLanes = 32, kBanks = 32;
constexpr uintptr_t kSectorBytes = 32, kWordBytes = 4;
constexpr unsigned kMostBytes = 16;  // of a lane in one request

// ---- Where memory is ----------------------------------------------------------------------------

struct Range {
  uintptr_t first = 0, bytes = 0;

  bool holds(uintptr_t at) const { return at - first < bytes; }
};

// This module's code and static data.
Range module_range() {
  struct Search {
    uintptr_t at;
    Range found;
  } search = {reinterpret_cast<uintptr_t>(&module_range), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& search = *static_cast<Search*>(data);
        uintptr_t first = ~uintptr_t{0}, last = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          first = std::min<uintptr_t>(first, info->dlpi_addr + segment.p_vaddr);
          last = std::max<uintptr_t>(last, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        const Range range = {first, last - first};
        if (!range.holds(search.at)) return 0;
        search.found = range;
        return 1;
      },
      &search);
  return search.found;
}

// The stack of the thread that launches: kernels' parameters are there.
Range host_stack() {
  pthread_attr_t attributes;
  void* bottom;
  size_t bytes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &bytes);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<uintptr_t>(bottom), bytes};
}

// ---- Sectors ------------------------------------------------------------------------------------

// Who touched a sector last, counted from 1.
struct Sector {
  uint32_t read_by = 0, written_by = 0;  // launches
  uint32_t read_by_block = 0;            // of all launches
};

using Sectors = Pages<Sector, 1024>;

// ---- Requests -----------------------------------------------------------------------------------

// Where requests come from.
struct Source {
  uint32_t place;
  Access access;
  bool shared;
  bool whole;      // not a piece of an access
  unsigned piece;  // which one
  unsigned bytes;  // of a lane

  uint64_t key() const {
    return uint64_t{place} << 32 | uint64_t{piece} << 16 | uint64_t{bytes} << 8 |
           uint64_t{whole} << 3 | uint64_t{shared} << 2 | static_cast<uint64_t>(access);
  }
};

// Which of a warp's requests.
struct Index {
  unsigned source = 0, turn = 0;
  bool exists = false;

  bool operator==(const Index& x) const {
    return exists == x.exists && source == x.source && turn == x.turn;
  }
};

struct Request {
  uint32_t lanes = 0;  // a bit each
  uintptr_t at[kLanes];
  Index before;  // the request that ends where this one begins, in every lane
  Index after;

  bool has(unsigned lane) const { return lanes >> lane & 1; }
};

// A warp's requests from one source since the warp last met, by turn.
struct Turns {
  std::vector<Request> requests;  // of which the first `used` count
  size_t used = 0;
  uint32_t next[kLanes] = {};  // turn of the lane
};

struct Warp {
  uint32_t block = 0;             // counted over all launches
  std::vector<Turns> turns;       // by number of the source
  std::vector<unsigned> sources;  // of which there are turns
  Index latest[2][kLanes];        // in shared memory, by Access: loads and stores
  bool loads = false;             // from global memory, in this phase
  uint64_t load_phases = 0;

  Request& at(Index index) { return turns[index.source].requests[index.turn]; }
};

struct State {
  std::vector<Launch> done;
  uint32_t launch_number = 0;

  // The launch.
  Launch launch;
  Range module = module_range(), host_stack;
  std::vector<Range> ignored;
  std::unordered_map<uint64_t, unsigned> numbers;  // of sources, by key
  std::vector<Source> sources;                     // by number
  std::vector<Requests> requests;                  // by number
  Sectors sectors;

  // The cluster.
  uint32_t first_block = 1, blocks = 0;  // counted over all launches
  unsigned block_warps = 0;
  std::vector<Range> shared;
  std::vector<Warp> warps;

  // The running thread.
  unsigned block = 0, thread = 0;

  Warp& warp() { return warps[block * block_warps + thread / kLanes]; }
};

State state;

// Different words that a group of lanes wants.
class Words {
 public:
  void add(uintptr_t word) {
    if (std::find(seen_, seen_ + count_, word) != seen_ + count_) return;
    seen_[count_++] = word;
    most_ = std::max(most_, ++in_bank_[word % kBanks]);
  }

  unsigned passes() const { return most_; }
  unsigned ideal() const { return (count_ + kBanks - 1) / kBanks; }

 private:
  uintptr_t seen_[kLanes * 2];
  unsigned count_ = 0, most_ = 0;
  unsigned in_bank_[kBanks] = {};
};

void count_shared(const Request& request, unsigned bytes, Requests& out) {
  const unsigned group = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;  // lanes
  uint64_t passes = 0;
  for (unsigned begin = 0; begin < kLanes; begin += group) {
    Words words;
    for (unsigned lane = begin; lane < begin + group; ++lane) {
      if (!request.has(lane)) continue;
      const uintptr_t at = request.at[lane];
      for (uintptr_t word = at / kWordBytes; word <= (at + bytes - 1) / kWordBytes; ++word) {
        words.add(word);
      }
    }
    passes += words.passes();
    out.ideal += words.ideal();
  }
  out.units += passes;
  out.most = std::max(out.most, passes);
}

void touch(uintptr_t number, Access access, uint32_t block) {
  Sector& sector = state.sectors.at(number);
  Launch& launch = state.launch;
  const uint32_t now = state.launch_number;
  if (access != Access::write) {
    if (!sector.read_by && !sector.written_by) ++launch.cold_reads;
    if (sector.read_by != now && sector.written_by && sector.written_by != now) ++launch.passed_on;
    if (sector.read_by_block != block) ++launch.block_reads;
    sector.read_by = now;
    sector.read_by_block = block;
  }
  if (access != Access::read) {
    if (!sector.written_by) ++launch.first_writes;
    sector.written_by = now;
  }
}

void count_global(const Request& request, unsigned bytes, uint32_t block, Requests& out) {
  struct Touched {
    uintptr_t sector;
    uint32_t bytes;  // a bit each
  } touched[2 * kLanes];
  unsigned count = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!request.has(lane)) continue;
    for (uintptr_t at = request.at[lane], end = at + bytes; at < end;) {
      const uintptr_t sector = at / kSectorBytes, stop = std::min(end, (sector + 1) * kSectorBytes);
      const uint64_t mask = ((uint64_t{1} << (stop - at)) - 1) << at % kSectorBytes;
      unsigned after = count;
      while (after > 0 && touched[after - 1].sector != sector) --after;
      if (after == 0) {
        touched[count] = {sector, 0};
        after = ++count;
      }
      touched[after - 1].bytes |= static_cast<uint32_t>(mask);
      at = stop;
    }
  }
  unsigned used = 0;
  for (unsigned i = 0; i < count; ++i) {
    used += __builtin_popcount(touched[i].bytes);
    touch(touched[i].sector, out.access, block);
  }
  out.units += count;
  out.ideal += (used + kSectorBytes - 1) / kSectorBytes;
  out.most = std::max<uint64_t>(out.most, count);
}

unsigned number_of(const Source& source) {
  const auto [found, fresh] = state.numbers.try_emplace(source.key(), state.sources.size());
  if (fresh) {
    state.sources.push_back(source);
    state.requests.push_back({source.place, source.access, source.shared, source.bytes});
  }
  return found->second;
}

void count(const Request& request, Source source, unsigned width, uint32_t block) {
  source.bytes *= width;
  Requests& out = state.requests[number_of(source)];
  ++out.count;
  out.lanes += __builtin_popcount(request.lanes);
  source.shared ? count_shared(request, source.bytes, out)
                : count_global(request, source.bytes, block, out);
}

// Of all lanes, aligned to `bytes`.
bool is_aligned(const Request& request, unsigned bytes) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (request.has(lane) && request.at[lane] % bytes != 0) return false;
  }
  return true;
}

// Counts a request and those after it.
void count_chain(Warp& warp, Index index) {
  while (index.exists) {
    const Source source = state.sources[index.source];
    const Request& first = warp.at(index);
    unsigned length = 1;
    Index end = first.after;
    Index ends[kMostBytes + 1] = {{}, end};  // behind so many of them
    while (end.exists && (length + 1) * source.bytes <= kMostBytes) {
      end = warp.at(end).after;
      ends[++length] = end;
    }
    unsigned width = kMostBytes / source.bytes;
    while (width > 1 && (width > length || !is_aligned(first, width * source.bytes))) width /= 2;
    count(first, source, width, warp.block);
    index = ends[width];
  }
}

void flush(Warp& warp) {
  const auto for_each = [&](const auto& f) {
    for (const unsigned number : warp.sources) {
      for (unsigned turn = 0; turn < warp.turns[number].used; ++turn) f(Index{number, turn, true});
    }
  };
  for_each([&](Index index) {
    Request& request = warp.at(index);
    if (!request.before.exists) return;
    Request& before = warp.at(request.before);
    if (before.after.exists || before.lanes != request.lanes) {
      request.before = {};
    } else {
      before.after = index;
    }
  });
  for_each([&](Index index) {
    if (!warp.at(index).before.exists) count_chain(warp, index);
  });
  for (const unsigned number : warp.sources) {
    warp.turns[number].used = 0;
    std::fill(std::begin(warp.turns[number].next), std::end(warp.turns[number].next), 0);
  }
  for (auto& latest : warp.latest) std::fill(std::begin(latest), std::end(latest), Index{});
  warp.sources.clear();
}

void end_phase(Warp& warp) {
  flush(warp);
  warp.load_phases += warp.loads;
  warp.loads = false;
}

// The request that ends where a lane's access begins: the lane's latest one, or its last turn.
Index find_before(Warp& warp, const Source& source, Index index, unsigned lane, uintptr_t at) {
  if (!source.shared || !source.whole || source.access == Access::atomic) return {};
  const Index last_turn = {index.source, index.turn - 1, index.turn > 0};
  for (const Index before : {warp.latest[static_cast<int>(source.access)][lane], last_turn}) {
    if (!before.exists || state.sources[before.source].bytes != source.bytes) continue;
    const Request& request = warp.at(before);
    if (request.has(lane) && request.at[lane] + source.bytes == at) return before;
  }
  return {};
}

void add(const Source& source, unsigned number, uintptr_t at) {
  Warp& warp = state.warp();
  const unsigned lane = state.thread % kLanes;
  if (warp.turns.size() <= number) warp.turns.resize(number + 1);
  Turns& turns = warp.turns[number];
  if (turns.used == 0) warp.sources.push_back(number);
  const Index index = {number, turns.next[lane]++, true};
  const Index before = find_before(warp, source, index, lane, at);
  if (index.turn == turns.used) {
    if (turns.requests.size() == turns.used) turns.requests.emplace_back();
    Request& request = turns.requests[turns.used++];
    request.lanes = 0;
    request.before = before;
    request.after = {};
  }
  Request& request = turns.requests[index.turn];
  if (!(request.before == before)) request.before = {};
  request.lanes |= 1u << lane;
  request.at[lane] = at;
  const bool can_go_on = source.shared && source.whole && source.access != Access::atomic;
  if (can_go_on) warp.latest[static_cast<int>(source.access)][lane] = index;
  warp.loads = warp.loads || (!source.shared && source.access == Access::read);
}

// The pieces that nvcc cuts an access into.
unsigned piece_bytes(uintptr_t first, size_t bytes, bool is_aligned) {
  if (is_aligned) return static_cast<unsigned>(bytes);
  const bool could_be = bytes <= kMostBytes && (bytes & (bytes - 1)) == 0;
  if (could_be) return static_cast<unsigned>(std::min<size_t>(bytes / 2, 4));
  const uintptr_t fits = first | bytes | kMostBytes;  // what a type of this size may be aligned to
  return static_cast<unsigned>(fits & -fits);
}

}  // namespace

void begin_launch(const char* name, uint64_t blocks, unsigned threads) {
  state.launch = {};
  state.launch.name = name;
  state.launch.blocks = blocks;
  state.launch.threads = threads;
  ++state.launch_number;
  state.host_stack = host_stack();
  state.ignored.clear();
  state.numbers.clear();
  state.sources.clear();
  state.requests.clear();
  state.warps.clear();
}

void end_launch() {
  for (Requests& requests : state.requests) {
    if (requests.count) state.launch.requests.push_back(requests);
  }
  state.done.push_back(std::move(state.launch));
}

void begin_cluster(unsigned blocks, unsigned warps) {
  state.first_block += state.blocks;
  state.blocks = blocks;
  state.block_warps = warps;
  state.shared.clear();
  state.warps.resize(blocks * warps);
  for (size_t i = 0; i < state.warps.size(); ++i) {
    state.warps[i].block = state.first_block + i / warps;
    state.warps[i].loads = false;
    state.warps[i].load_phases = 0;
  }
}

void end_cluster() {
  for (Warp& warp : state.warps) {
    end_phase(warp);
    state.launch.load_phases = std::max(state.launch.load_phases, warp.load_phases);
  }
}

void run(unsigned block, unsigned thread) {
  state.block = block;
  state.thread = thread;
}

void barrier(unsigned block) {
  ++state.launch.barriers;
  for (unsigned i = 0; i < state.block_warps; ++i) {
    end_phase(state.warps[block * state.block_warps + i]);
  }
}

void cluster_barrier() {
  state.launch.barriers += state.blocks;
  for (Warp& warp : state.warps) end_phase(warp);
}

void collective(const char* kind) {
  const bool multiplies = std::strcmp(kind, "all_lanes") == 0 || std::strstr(kind, "products");
  if (multiplies) return flush(state.warp());
  ++state.launch.collectives;
  end_phase(state.warp());
}

void ignore(const void* data, size_t bytes) {
  state.ignored.push_back({reinterpret_cast<uintptr_t>(data), bytes});
}

void shared_object(const void* data, size_t bytes) {
  state.shared.push_back({reinterpret_cast<uintptr_t>(data), bytes});
}

void note(Access access, uintptr_t first, size_t bytes, bool is_aligned, uint32_t place) {
  const auto holds = [&](const Range& range) { return range.holds(first); };
  const bool shared = std::any_of(state.shared.begin(), state.shared.end(), holds);
  if (!shared) {
    if (state.module.holds(first) || state.host_stack.holds(first)) return;
    if (std::any_of(state.ignored.begin(), state.ignored.end(), holds)) return;
  }
  const unsigned size = piece_bytes(first, bytes, is_aligned);
  for (unsigned piece = 0; piece * size < bytes; ++piece) {
    const Source source = {place, access, shared, size == bytes, piece, size};
    add(source, number_of(source), first + piece * size);
  }
}

std::vector<Launch> take() {
  state.sectors.clear();
  state.launch_number = state.blocks = 0;
  state.first_block = 1;
  return std::exchange(state.done, {});
}

}  // namespace vtp::emulator::traffic

#endif
