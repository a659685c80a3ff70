// What the emulator tells the traffic counter (traffic.cpp) in builds with VTP_EMULATOR_TRAFFIC; in
// others nothing is told and nothing counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "accesses.h"

namespace vtp::emulator::traffic {

#ifdef VTP_EMULATOR_TRAFFIC
#define VTP_TRAFFIC(declaration) declaration;
#else
#define VTP_TRAFFIC(declaration) inline declaration {}
#endif

VTP_TRAFFIC(void begin_launch(const char* /*name*/, uint64_t /*blocks*/, unsigned /*threads*/))
VTP_TRAFFIC(void end_launch())
VTP_TRAFFIC(void begin_cluster(unsigned /*blocks*/, unsigned /*warps of each*/))
VTP_TRAFFIC(void end_cluster())
// A thread of a block of the cluster runs from now on.
VTP_TRAFFIC(void run(unsigned /*block*/, unsigned /*thread*/))
// All threads of the block have met, or of the cluster, or the running warp's lanes.
VTP_TRAFFIC(void barrier(unsigned /*block*/))
VTP_TRAFFIC(void cluster_barrier())
VTP_TRAFFIC(void collective(const char* /*kind*/))

// Memory of the emulator's own, until the next launch.
VTP_TRAFFIC(void ignore(const void* /*data*/, size_t /*bytes*/))
// Shared memory, until the next cluster.
VTP_TRAFFIC(void shared_object(const void* /*data*/, size_t /*bytes*/))

// The running thread's access.
VTP_TRAFFIC(void note(Access, uintptr_t /*first*/, size_t /*bytes*/, bool /*is_aligned*/,
                      uint32_t /*place*/))

#undef VTP_TRAFFIC

#ifdef VTP_EMULATOR_TRAFFIC

// The requests of one kind that one place in the code made.
struct Requests {
  uint32_t place;
  Access access;
  bool shared;
  unsigned bytes;  // of a lane
  uint64_t count = 0;
  uint64_t lanes = 0;
  uint64_t units = 0, ideal = 0;  // sectors of 32 bytes or, in shared memory, passes
  uint64_t most = 0;              // units of one request
};

// Counts of sectors are of global memory.
struct Launch {
  std::string name;
  uint64_t blocks = 0;
  unsigned threads = 0;
  uint64_t cold_reads = 0;     // sectors that nothing has touched since the last take()
  uint64_t first_writes = 0;   // sectors that nothing has written since then
  uint64_t passed_on = 0;      // sectors read that an earlier launch has written
  uint64_t block_reads = 0;    // sectors read, each once a block
  uint64_t barriers = 0;       // of all blocks, those of clusters too
  uint64_t collectives = 0;    // of all warps
  uint64_t load_phases = 0;    // of the warp that has most
  std::vector<Requests> requests;
};

// The launches since the last call.
std::vector<Launch> take();

#endif

}  // namespace vtp::emulator::traffic
