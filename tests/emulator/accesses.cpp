// Kernels are compiled with -fsanitize=thread, which puts a call before each access. Those calls
// end here instead of in the sanitizer's own library, which knows nothing but threads of the host.
// All that is here, in races.cpp and in traffic.cpp must be compiled without that flag.
#include "accesses.h"

#ifdef VTP_EMULATOR_ACCESSES

#include <dlfcn.h>

#include <cstdio>
#include <utility>

#include "races.h"
#include "traffic.h"

namespace vtp::emulator {
namespace {

struct State {
  bool tracking = false;
  uintptr_t stack = 0;  // of the running thread
  size_t stack_bytes = 0;
};

State state;

const Dl_info& this_module() {
  static const Dl_info info = [] {
    Dl_info found;
    dladdr(&state, &found);
    return found;
  }();
  return info;
}

uint32_t offset_of(const void* place) {
  static const char* const base = static_cast<const char*>(this_module().dli_fbase);
  return static_cast<uint32_t>(static_cast<const char*>(place) - base);
}

}  // namespace

namespace accesses {

void run(unsigned block, unsigned thread, const void* stack, size_t stack_bytes) {
  races::run(block, thread);
  traffic::run(block, thread);
  state.stack = reinterpret_cast<uintptr_t>(stack);
  state.stack_bytes = stack_bytes;
}

bool track(bool on) { return std::exchange(state.tracking, on); }

void note(Access access, const void* data, size_t bytes, bool is_aligned, const void* place) {
  const Untracked untracked;  // the linker may take instrumented copies of the library's templates
  const auto first = reinterpret_cast<uintptr_t>(data);
  if (first - state.stack < state.stack_bytes) return;
  const uint32_t offset = offset_of(place);
  races::note(access, first, bytes, offset);
  traffic::note(access, first, bytes, is_aligned, offset);
}

void note_landing(const void* data, size_t bytes, const void* place) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  races::note(Access::write, first, bytes, offset_of(place));
}

void note_operand(const void* data, size_t bytes, const void* place) {
  races::note_operand(reinterpret_cast<uintptr_t>(data), bytes, offset_of(place));
}

void note_request(const void* data, size_t bytes, const void* place) {
  const auto first = reinterpret_cast<uintptr_t>(data);
  traffic::note(Access::read, first, bytes, true, offset_of(place));
}

// Of the call that returns to the place and, if its function was inlined there, where from:
// "inner:1 < outer:2". The emulator's own functions are left out.
std::string source(uint32_t place) {
  char command[4096], line[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x", this_module().dli_fname,
                place - 1);
  FILE* lines = popen(command, "r");
  if (!lines) return "?";
  std::string source;
  while (std::fgets(line, sizeof line, lines)) {
    std::string text(line);
    text.erase(text.find_first_of(" \n"));  // also " (discriminator 2)"
    const bool ours = text.find("/emulator/cuda/") != std::string::npos ||
                      text.find("/emulator/emulator.h") != std::string::npos;
    if (!ours) source += (source.empty() ? "" : " < ") + text;
  }
  pclose(lines);
  return source.empty() ? "?" : source;
}

}  // namespace accesses
}  // namespace vtp::emulator

// ---- What the compiler calls --------------------------------------------------------------------

#define VTP_NOTE(access, data, bytes, is_aligned)                             \
  if (vtp::emulator::state.tracking) {                                        \
    vtp::emulator::accesses::note(vtp::emulator::Access::access, data, bytes, \
                                  is_aligned, __builtin_return_address(0));   \
  }

#define VTP_HOOKS(bytes)                                                               \
  void __tsan_read##bytes(void* data) { VTP_NOTE(read, data, bytes, true) }            \
  void __tsan_write##bytes(void* data) { VTP_NOTE(write, data, bytes, true) }          \
  void __tsan_unaligned_read##bytes(void* data) { VTP_NOTE(read, data, bytes, false) } \
  void __tsan_unaligned_write##bytes(void* data) { VTP_NOTE(write, data, bytes, false) }

extern "C" {

VTP_HOOKS(1)
VTP_HOOKS(2)
VTP_HOOKS(4)
VTP_HOOKS(8)
VTP_HOOKS(16)
void __tsan_read_range(void* data, size_t bytes) { VTP_NOTE(read, data, bytes, false) }
void __tsan_write_range(void* data, size_t bytes) { VTP_NOTE(write, data, bytes, false) }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

// Of the host's code, as for local statics: kernels have none of these.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* at, uint32_t x, int) {
  return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}

}  // extern "C"

#endif
