// What the emulator tells the race detector (races.cpp) in builds with VTP_EMULATOR_RACES; in others
// nothing is told and nothing found.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "site.h"

namespace vtp::emulator {

enum class Access { read, write, atomic };

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

// A thread of a block of the cluster runs from now on, on a stack that is nobody else's.
VTP_RACES(void run(unsigned /*block*/, unsigned /*thread*/, const void* /*stack*/, size_t /*bytes*/))
// It has come to so many cluster barriers and waited for the first of them, and for the kernels
// before.
VTP_RACES(void order(unsigned /*arrivals*/, unsigned /*waits*/, bool /*after_earlier_kernels*/))
// The running thread is its block's last, with which this shared memory goes.
VTP_RACES(void end_of_block(const void* /*data*/, size_t /*bytes*/))

// Memory that goes: whoever has its place next begins anew.
VTP_RACES(void forget(const void* /*data*/, size_t /*bytes*/))

// The running thread's access, by code at `place`.
VTP_RACES(void note(Access, const void* /*data*/, size_t /*bytes*/, const void* /*place*/))

#undef VTP_RACES

#ifdef VTP_EMULATOR_RACES

// Says whether accesses are the kernel's from now on, or the emulator's own; returns what was.
bool track(bool on);

// Where barriers that are no votes have been met since they were last forgotten; one of them, "" for
// none, is to be taken for no barrier. What then is a race tells what the barrier is for.
std::vector<std::string> barriers();
void forget_barriers();
void ignore_barrier(const std::string& site);

// Whether the barrier there, now met, is to be taken for one.
bool orders(const Site&);

// The launch's first race, in words; "" if there is none.
std::string found();

// The address of the code that asks.
__attribute__((noinline)) inline const void* this_place() { return __builtin_return_address(0); }

#else

inline bool track(bool) { return false; }
inline std::vector<std::string> barriers() { return {}; }
inline void forget_barriers() {}
inline void ignore_barrier(const std::string&) {}
inline bool orders(const Site&) { return true; }
inline std::string found() { return ""; }
inline const void* this_place() { return nullptr; }

#endif

}  // namespace races

// Within its scope the emulator runs, not the kernel.
class Untracked {
 public:
  Untracked() : before_(races::track(false)) {}
  ~Untracked() { races::track(before_); }
  Untracked(const Untracked&) = delete;
  Untracked& operator=(const Untracked&) = delete;

  // An access on the kernel's behalf.
  void note(Access access, const void* data, size_t bytes, const void* place) const {
    if (before_) races::note(access, data, bytes, place);
  }

 private:
  bool before_;
};

}  // namespace vtp::emulator
