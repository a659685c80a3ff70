// Atomics on integers. There are none on floats, whose sums would depend on the order of threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../emulator.h"

namespace vtp::emulator {

// The value is converted, as for an ordinary parameter; only the pointer tells the type.
template <class T>
struct Exactly {
  using Type = T;
};

template <class T, class... Choices>
using IfOneOf = std::enable_if_t<(std::is_same_v<T, Choices> || ...), T>;

template <class T>
using AnyInteger = IfOneOf<T, int, unsigned, long long, unsigned long long>;

template <class T, class Operation>
__attribute__((always_inline)) inline T atomically(T* at, Operation operation) {
  const void* const place = accesses::this_place();
  multiprocessor.preempt();
  const Untracked untracked;
  untracked.note(Access::atomic, at, sizeof *at, place);
  const T old = *at;
  *at = operation(old);
  return old;
}

}  // namespace vtp::emulator

#define VTP_EMULATOR_ATOMIC(name, types, result)                              \
  template <class T>                                                          \
  __attribute__((always_inline)) inline types name(T* at, typename vtp::emulator::Exactly<T>::Type x) {             \
    return vtp::emulator::atomically(at, [&](T old) -> T { return result; }); \
  }

#define VTP_EMULATOR_ADDABLE vtp::emulator::IfOneOf<T, int, unsigned, unsigned long long>
#define VTP_EMULATOR_32_BITS vtp::emulator::IfOneOf<T, int, unsigned>

VTP_EMULATOR_ATOMIC(atomicAdd, VTP_EMULATOR_ADDABLE, old + x)
VTP_EMULATOR_ATOMIC(atomicSub, VTP_EMULATOR_32_BITS, old - x)
VTP_EMULATOR_ATOMIC(atomicExch, VTP_EMULATOR_ADDABLE, ((void)old, x))
VTP_EMULATOR_ATOMIC(atomicMin, vtp::emulator::AnyInteger<T>, std::min(old, x))
VTP_EMULATOR_ATOMIC(atomicMax, vtp::emulator::AnyInteger<T>, std::max(old, x))
VTP_EMULATOR_ATOMIC(atomicAnd, VTP_EMULATOR_ADDABLE, old & x)
VTP_EMULATOR_ATOMIC(atomicOr, VTP_EMULATOR_ADDABLE, old | x)
VTP_EMULATOR_ATOMIC(atomicXor, VTP_EMULATOR_ADDABLE, old ^ x)

#undef VTP_EMULATOR_32_BITS
#undef VTP_EMULATOR_ADDABLE
#undef VTP_EMULATOR_ATOMIC

template <class T>
__attribute__((always_inline)) inline vtp::emulator::IfOneOf<T, int, unsigned, unsigned long long>
atomicCAS(
    T* at, typename vtp::emulator::Exactly<T>::Type expected,
    typename vtp::emulator::Exactly<T>::Type x) {
  return vtp::emulator::atomically(at, [&](T old) -> T { return old == expected ? x : old; });
}
