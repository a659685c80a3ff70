// A panel: query rows side by side, one per vector lane, and their logits against a block of keys.
// Softmax along keys then needs no horizontal step: maximum, sum and mask are lane by lane.
#pragma once

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int kBlock = 48;  // keys a block: at D = 128 their floats take 24 KB of L1

template <class A>
struct LaneInt {
  using Type = int32_t;
};
template <>
struct LaneInt<double> {
  using Type = int64_t;
};

template <class T, int V>
struct Panel {
  using A = Wide<T>;
  using Int = typename LaneInt<A>::Type;
  static constexpr int kWidth = V * kLanes<A>;

  int64_t dim, rows = 0;
  A factor;                       // on the queries: logits come out in base 2
  Scratch<A> packed;              // [dim, kWidth]
  Scratch<A> tile;                // [kBlock, dim]: keys, widened
  alignas(64) Int bound[kWidth];  // lane i attends keys up to bound[i]; -1 while it holds no row

  VTP_INLINE Panel(int64_t head_dim, double scale)
      : dim(head_dim),
        factor(static_cast<A>(scale * kLog2e)),
        packed(head_dim * kWidth),
        tile(kBlock * head_dim) {
    std::memset(packed, 0, sizeof(A) * dim * kWidth);
    for (int i = 0; i < kWidth; ++i) bound[i] = -1;
  }

  VTP_INLINE void add_row(const T* query, int64_t last_key) {
    for (int64_t d = 0; d < dim; ++d) packed[d * kWidth + rows] = widen(query[d]) * factor;
    bound[rows] = static_cast<Int>(last_key);
    ++rows;
  }

  VTP_INLINE Ints<A> bounds(int v) const { return bits_at<Ints<A>>(bound + v * kLanes<A>); }

  // logits[j][lane] of the keys at position[0 ... count)
  VTP_INLINE void logits(const View<const T, 4>& key, int64_t batch, int64_t head,
                         const int32_t* position, int64_t count, A* out) const {
    const T* base = key.at(batch, head);
    const int64_t stride = key.stride[2];
    for (int64_t j = 0; j < count; ++j) widen_row(base + position[j] * stride, dim, tile + j * dim);
    product<A, V>(packed, tile, dim, 1, dim, count, out, false);
  }
};

// Running softmax statistics of one vector of lanes: the sum of 2^(logit - maximum) so far.
template <class A>
struct LaneSoftmax {
  Vec<A> maximum = splat<A>(-INFINITY), sum = {};

  // What a block did to the statistics.
  struct Step {
    Vec<A> top;   // the block's own maximum
    Vec<A> keep;  // 2^(old maximum - new maximum)
    Vec<A> gain;  // 2^(top - new maximum)
  };

  // A maximum to subtract: finite where there was nothing to attend to.
  static VTP_INLINE Vec<A> base(Vec<A> maximum) {
    return maximum == -INFINITY ? Vec<A>{} : maximum;
  }

  // Turns a block of logits, `stride` apart, into exponentials relative to the block's maximum, 0
  // where a lane's bound lies before the key.
  VTP_INLINE Step add(A* block, int64_t stride, const int32_t* position, int64_t count,
                      Ints<A> bound) {
    Vec<A> top = splat<A>(-INFINITY);
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> x = load(block + j * stride);
      x = bound >= position[j] ? x : splat<A>(-INFINITY);
      store(block + j * stride, x);
      top = larger<A>(top, x);
    }
    Vec<A> block_sum = {};
    const Vec<A> top_base = base(top);
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> y = exp2_of(load(block + j * stride) - top_base);
      store(block + j * stride, y);
      block_sum = block_sum + y;
    }
    const Vec<A> next = larger<A>(maximum, top), next_base = base(next);
    const Step step = {top, exp2_of(maximum - next_base), exp2_of(top - next_base)};
    sum = sum * step.keep + block_sum * step.gain;
    maximum = next;
    return step;
  }
};

// weight / sum. A sum of 0 is a lane that attends to nothing, share 0, unless it does attend and
// all its logits are -inf: then NaN, as softmax has it.
template <class A>
VTP_INLINE Vec<A> softmax_share(A weight, Vec<A> sum, Ints<A> attends) {
  const Vec<A> nothing = attends ? splat<A>(NAN) : Vec<A>{};
  return sum == 0 ? nothing : weight / sum;
}

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
