// What the emulator tells the race detector (races.cpp) in builds with VTP_EMULATOR_RACES; in others
// nothing is told and nothing found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "accesses.h"
#include "site.h"

namespace vtp::emulator {
namespace races {

#ifdef VTP_EMULATOR_RACES
#define VTP_RACES(declaration) declaration;
#else
#define VTP_RACES(declaration) inline declaration {}
#endif

// A dependent launch is in no order with those before it, back to the last plain one, until a thread
// has waited for them.
VTP_RACES(void begin_launch(bool /*dependent*/))
VTP_RACES(void begin_cluster(unsigned /*blocks*/, unsigned /*warps of each*/))
// All threads of the block have met, or the running warp's lanes.
VTP_RACES(void barrier(unsigned /*block*/, const Site&, bool /*is_vote*/))
VTP_RACES(void warp_barrier(const Site&))
// What the running thread has written to shared memory can be read by products behind a barrier.
VTP_RACES(void fence_operands(const Site&))

// A thread of a block of the cluster runs from now on.
VTP_RACES(void run(unsigned /*block*/, unsigned /*thread*/))
// It has come to so many cluster barriers and waited for the first of them, and for the kernels
// before.
VTP_RACES(void order(unsigned /*arrivals*/, unsigned /*waits*/, bool /*after_earlier_kernels*/))
// The running thread is its block's last, with which this shared memory goes.
VTP_RACES(void end_of_block(const void* /*data*/, size_t /*bytes*/))

// Memory that goes: whoever has its place next begins anew.
VTP_RACES(void forget(const void* /*data*/, size_t /*bytes*/))

// The running thread's access.
VTP_RACES(void note(Access, uintptr_t /*first*/, size_t /*bytes*/, uint32_t /*place*/))
// A read of shared memory by products of its warpgroup.
VTP_RACES(void note_operand(uintptr_t /*first*/, size_t /*bytes*/, uint32_t /*place*/))

#undef VTP_RACES

#ifdef VTP_EMULATOR_RACES

// Where barriers that are no votes have been met since they were last forgotten; one of them, "" for
// none, is to be taken for no barrier. What then is a race tells what the barrier is for.
std::vector<std::string> barriers();
void forget_barriers();
void ignore_barrier(const std::string& site);

// Whether the barrier there, now met, is to be taken for one.
bool orders(const Site&);

// The launch's first race, in words; "" if there is none.
std::string found();

#else

inline std::vector<std::string> barriers() { return {}; }
inline void forget_barriers() {}
inline void ignore_barrier(const std::string&) {}
inline bool orders(const Site&) { return true; }
inline std::string found() { return ""; }

#endif

}  // namespace races
}  // namespace vtp::emulator
