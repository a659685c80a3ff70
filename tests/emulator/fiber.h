// Stacks that are switched by hand: a CUDA thread runs on one until it must wait for others.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define VTP_EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(VTP_EMULATOR_UCONTEXT)
#define VTP_EMULATOR_UCONTEXT 1
#endif
#ifdef VTP_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace vtp::emulator {

// Memory for one stack above a page that may not be touched: an overflow ends the program instead
// of spoiling the neighbour.
class Stack {
 public:
#ifdef VTP_EMULATOR_ASAN
  static constexpr size_t kBytes = 512 << 10;  // frames carry red zones
#else
  static constexpr size_t kBytes = 128 << 10;
#endif

  Stack() {
    const size_t page = sysconf(_SC_PAGESIZE);
    mapping_bytes_ = kBytes + page;
    mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping_, page, PROT_NONE);
    bottom_ = static_cast<char*>(mapping_) + page;
  }
  ~Stack() { munmap(mapping_, mapping_bytes_); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }

 private:
  void* mapping_;
  size_t mapping_bytes_;
  char* bottom_;
};

#ifndef VTP_EMULATOR_UCONTEXT
// Leaves this stack, having noted in *save how to come back, for the one noted in `load`. What a
// callee must preserve lives on the stack meanwhile.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

// A flow of control with a stack of its own. The one made by default is the host's.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the fiber begin in `entry`, which must call `arrive` first and never return. Fibers of
  // different `color` use different cache sets for the hot end of their stacks.
  void prepare(const Stack& stack, unsigned color, void (*entry)()) {
    bottom_ = stack.bottom();
    size_ = Stack::kBytes - color % 16 * 256;
#ifdef VTP_EMULATOR_ASAN
    __asan_unpoison_memory_region(bottom_, Stack::kBytes);  // frames that were left for good
    fake_stack_ = nullptr;
#endif
#ifdef VTP_EMULATOR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(bottom_ + size_);
    *--top = nullptr;  // entry's return address, where backtraces end
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers switch_stacks restores
    stack_pointer_ = top;
#endif
  }

  // For the host: takes the calling thread's stack as its own.
  void adopt_thread() {
#ifdef VTP_EMULATOR_ASAN
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    bottom_ = static_cast<char*>(bottom);
#endif
  }

  // Goes from this fiber, the running one, to another; comes back when somebody switches here.
  void switch_to(Fiber& next) {
#ifdef VTP_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#ifdef VTP_EMULATOR_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    switch_stacks(&stack_pointer_, next.stack_pointer_);
#endif
    arrive();
  }

  void arrive() {
#ifdef VTP_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
#ifdef VTP_EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  char* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace vtp::emulator
