// The first of the largest.
#pragma once

#include "gram.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

// The largest value, and where it came first.
template <class A>
class Best {
 public:
  VTP_INLINE explicit Best(A lowest) {
    for (int lane = 0; lane < kLanes<A>; ++lane) lane_[lane] = lane;
    for (int chain = 0; chain < kChains; ++chain) {
      value_[chain] = splat(lowest);
      at_[chain] = Ints<A>{} - 1;
    }
  }

  // value(i) is the vector of values at i, for i in [begin, begin + kPanel).
  template <class F>
  VTP_INLINE void add_panel(int64_t begin, const F& value) {
    for (int64_t i = begin; i < begin + kPanel; i += kChains * kLanes<A>) {
      for (int chain = 0; chain < kChains; ++chain) {  // none waits for another
        const int64_t at = i + chain * kLanes<A>;
        const Vec<A> x = value(at);
        const Ints<A> above = x > value_[chain];
        value_[chain] = above ? x : value_[chain];
        at_[chain] = above ? lane_ + static_cast<Lane>(at) : at_[chain];
      }
    }
  }

  // -1 where none was above the lowest.
  VTP_INLINE int64_t index() const {
    int64_t found = -1;
    A top = 0;
    for (int chain = 0; chain < kChains; ++chain) {
      for (int lane = 0; lane < kLanes<A>; ++lane) {
        const A x = value_[chain][lane];
        const int64_t at = at_[chain][lane];
        if (at < 0 || (found >= 0 && (x < top || (x == top && at > found)))) continue;
        top = x, found = at;
      }
    }
    return found;
  }

 private:
  static constexpr int kChains = 3;
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vec<A> value_[kChains];
  Ints<A> lane_, at_[kChains];
};

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
