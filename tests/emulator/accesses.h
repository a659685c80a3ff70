// The memory accesses of kernels, in builds that watch them: "races" (VTP_EMULATOR_RACES) and
// "traffic" (VTP_EMULATOR_TRAFFIC). In others nothing is told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#if defined(VTP_EMULATOR_RACES) || defined(VTP_EMULATOR_TRAFFIC)
#define VTP_EMULATOR_ACCESSES
#endif

namespace vtp::emulator {

enum class Access { read, write, atomic };

namespace accesses {

#ifdef VTP_EMULATOR_ACCESSES

// A thread of a block of the cluster runs from now on, on a stack that is nobody else's.
void run(unsigned block, unsigned thread, const void* stack, size_t stack_bytes);

// Says whether accesses are the kernel's from now on, or the emulator's own; returns what was.
bool track(bool on);

// The running thread's access, by code at `place`. Aligned: its type is, to its size.
void note(Access, const void* data, size_t bytes, bool is_aligned, const void* place);

// What a copy to shared memory brings lands: a write, but no request, which its issue was.
void note_landing(const void* data, size_t bytes, const void* place);

// A read by products of a warpgroup, of what several threads share; and what one of them asks for.
void note_operand(const void* data, size_t bytes, const void* place);
void note_request(const void* data, size_t bytes, const void* place);

// "file:line" of the code at a place, which is told as its distance from the module's start.
std::string source(uint32_t place);

// The address of the code that asks.
__attribute__((noinline)) inline const void* this_place() { return __builtin_return_address(0); }

#else

inline void run(unsigned, unsigned, const void*, size_t) {}
inline bool track(bool) { return false; }
inline void note(Access, const void*, size_t, bool, const void*) {}
inline void note_landing(const void*, size_t, const void*) {}
inline void note_operand(const void*, size_t, const void*) {}
inline void note_request(const void*, size_t, const void*) {}
inline const void* this_place() { return nullptr; }

#endif

}  // namespace accesses

// Within its scope the emulator runs, not the kernel.
class Untracked {
 public:
  Untracked() : before_(accesses::track(false)) {}
  ~Untracked() { accesses::track(before_); }
  Untracked(const Untracked&) = delete;
  Untracked& operator=(const Untracked&) = delete;

  // An access on the kernel's behalf.
  void note(Access access, const void* data, size_t bytes, const void* place) const {
    if (before_) accesses::note(access, data, bytes, true, place);
  }
  void note_landing(const void* data, size_t bytes, const void* place) const {
    if (before_) accesses::note_landing(data, bytes, place);
  }
  void note_operand(const void* data, size_t bytes, const void* place) const {
    if (before_) accesses::note_operand(data, bytes, place);
  }
  void note_request(const void* data, size_t bytes, const void* place) const {
    if (before_) accesses::note_request(data, bytes, place);
  }

 private:
  bool before_;
};

}  // namespace vtp::emulator
