// Where a sorted curve bends, by one block: the rules of vtp_kernels/reference.py, which explains
// them. The same float64 operations in the same order, each rounded once (none is fused), so that
// the kept sets are equal bit for bit; what runs side by side here is order-free or exact.
#pragma once

#include "../arguments.h"
#include "sortable.cuh"
#include "warp.cuh"

namespace vtp::cuda {

constexpr int kNoRank = 0x7fffffff;
constexpr uint32_t kZeroKey = 0x80000000u;

template <int Threads>
struct KneeScratch {
  double bound;
  BlockScratch<double> doubles;
  BlockScratch<int> ranks, more_ranks;
  BlockScratch<uint32_t> keys;
  int knee;
  // Of kneedle:
  double difference[Threads], peak;
  int last_max, last_min, first_fire;
};

// The finite scores, descending: y_0 ... y_{n-1}, n > 0, cut off at a limit.
struct FiniteRun {
  const uint32_t* keys;
  int n;
  double limit;

  VTP_DEVICE double operator()(int i) const {
    const double y = static_cast<double>(score_of(keys[i]));
    return y < limit ? y : limit;
  }
};

VTP_DEVICE double quantile(const FiniteRun& y, double q) {
  const double position = __dmul_rn(static_cast<double>(y.n - 1), q);
  const double below = floor(position);
  const double t = __dsub_rn(position, below);
  const int low_at = y.n - 1 - static_cast<int>(below);
  const double low = y(low_at), high = y(low_at > 0 ? low_at - 1 : 0);
  const double step = __dsub_rn(high, low);
  return t < 0.5 ? __dadd_rn(low, __dmul_rn(step, t))
                 : __dsub_rn(high, __dmul_rn(step, __dsub_rn(1.0, t)));
}

// Scores above it are outliers.
VTP_DEVICE double upper_fence(const FiniteRun& y) {
  const double q1 = quantile(y, 0.25), q3 = quantile(y, 0.75);
  return __dadd_rn(q3, __dmul_rn(1.5, __dsub_rn(q3, q1)));
}

// Minimum or maximum over the block, for every thread. The scratch is free again after a barrier.
template <int Threads, class T, class Operation>
VTP_DEVICE T block_extreme(T x, Operation operation, BlockScratch<T>& scratch) {
  x = warp_reduce(x, operation);
  if (lane_id() == 0) scratch.per_warp[warp_id()] = x;
  __syncthreads();
  return warp_reduce(scratch.per_warp[lane_id() % (Threads / kWarp)], operation);
}

template <int Threads>
VTP_DEVICE int first_rank(int rank, KneeScratch<Threads>& scratch) {
  return block_extreme<Threads>(rank, Min{}, scratch.ranks);
}

// The rank farthest below the chord through both ends, the first of equals.
template <int Threads>
VTP_DEVICE int chord_knee(const FiniteRun& y, double epsilon, KneeScratch<Threads>& scratch) {
  const double last = static_cast<double>(y.n - 1), top = y(0);
  const double bottom = y(y.n - 1), whole_drop = __dsub_rn(top, bottom);
  const double height = fabs(top) > fabs(bottom) ? fabs(top) : fabs(bottom);
  double farthest = __dmul_rn(__dmul_rn(epsilon, height), last);  // nearer is rounding
  int rank = kNoRank;
  for (int i = static_cast<int>(threadIdx.x); i < y.n; i += Threads) {
    const double drop = __dmul_rn(__dsub_rn(top, y(i)), last);
    const double distance = __dsub_rn(drop, __dmul_rn(static_cast<double>(i), whole_drop));
    if (distance > farthest) {
      farthest = distance;
      rank = i;
    }
  }
  const double farthest_of_all = block_extreme<Threads>(farthest, Max{}, scratch.doubles);
  const int first = first_rank(farthest == farthest_of_all ? rank : kNoRank, scratch);
  return first == kNoRank ? -1 : first;
}

// Maximum of x over the lanes up to this one.
VTP_DEVICE int warp_inclusive_max(int x) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, offset);
    x = lane_id() >= offset && before > x ? before : x;
  }
  return x;
}

// Kneedle walks along the curve: extremes arm and disarm it, a fall far enough below the last
// maximum fires. Here a block looks at Threads - 2 ranks at once (the outer threads supply the
// neighbours): scans find the last extremes up to each, and the first rank that fires ends it.
template <int Threads>
VTP_DEVICE int kneedle_knee(const FiniteRun& y, double sensitivity, KneeScratch<Threads>& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const double last = static_cast<double>(y.n - 1), low = y(y.n - 1);
  const double range = __dsub_rn(y(0), low), margin = __dmul_rn(sensitivity, __ddiv_rn(1.0, last));
  if (thread == 0) {
    scratch.last_max = scratch.last_min = -1;
    scratch.peak = 0.0;
    scratch.first_fire = kNoRank;
  }
  for (int begin = 0; begin < y.n - 1; begin += Threads - 2) {
    const int i = begin - 1 + thread, at = i < 0 ? 0 : i < y.n ? i : y.n - 1;
    const double height = __ddiv_rn(__dsub_rn(y(at), low), range);
    const double here = __dsub_rn(__dsub_rn(1.0, height), __ddiv_rn(static_cast<double>(at), last));
    scratch.difference[thread] = here;
    __syncthreads();

    const bool walks = thread > 0 && thread < Threads - 1 && i < y.n - 1;
    const double before = scratch.difference[walks ? thread - 1 : thread];
    const double after = scratch.difference[walks ? thread + 1 : thread];
    int last_max = warp_inclusive_max(walks && here >= before && here >= after ? i : -1);
    int last_min = warp_inclusive_max(walks && here <= before && here <= after ? i : -1);
    if (lane_id() == kWarp - 1) {
      scratch.ranks.per_warp[warp_id()] = last_max;
      scratch.more_ranks.per_warp[warp_id()] = last_min;
    }
    __syncthreads();

    const bool earlier = lane_id() < warp_id();
    const Max larger;
    const int earlier_max = warp_max(earlier ? scratch.ranks.per_warp[lane_id()] : -1);
    const int earlier_min = warp_max(earlier ? scratch.more_ranks.per_warp[lane_id()] : -1);
    last_max = larger(larger(last_max, earlier_max), scratch.last_max);
    last_min = larger(larger(last_min, earlier_min), scratch.last_min);
    const bool is_here = last_max >= begin;
    const double peak = is_here ? scratch.difference[last_max - begin + 1] : scratch.peak;
    const bool fires = walks && last_max > last_min && after < __dsub_rn(peak, margin);
    if (fires) atomicMin(&scratch.first_fire, i);
    __syncthreads();

    if (scratch.first_fire != kNoRank) {
      if (fires && i == scratch.first_fire) scratch.knee = last_max;
      __syncthreads();
      return scratch.knee;
    }
    if (thread == Threads - 1) {
      scratch.last_max = last_max;
      scratch.last_min = last_min;
      scratch.peak = peak;
    }
  }
  return -1;
}

// The last rank above the fence.
template <int Threads>
VTP_DEVICE int iqr_knee(const FiniteRun& y, double fence, KneeScratch<Threads>& scratch) {
  int rank = y.n;
  for (int i = static_cast<int>(threadIdx.x); i < y.n; i += Threads) {
    if (y(i) > fence) continue;
    rank = i;
    break;
  }
  return first_rank(rank, scratch) - 1;
}

VTP_DEVICE double weight(const FiniteRun& y, int i) {
  const double score = y(i);
  return score > 0.0 ? score : 0.0;
}

// One addition after the other, as the sum is defined.
VTP_DEVICE int mass_knee_in_order(const FiniteRun& y, double mass) {
  double total = 0.0, held = 0.0;
  for (int i = 0; i < y.n; ++i) total = __dadd_rn(total, weight(y, i));
  const double target = __dmul_rn(mass, total);
  for (int i = 0; i < y.n; ++i) {
    held = __dadd_rn(held, weight(y, i));
    if (held >= target) return i;
  }
  return -1;
}

// 2^52 units in the last place of the score of a key, which is positive.
VTP_DEVICE double largest_exact_sum(uint32_t key) {
  const uint32_t exponent = (key & 0x7fffffffu) >> 23;  // 0 where subnormal, which counts as 1
  return __longlong_as_double(static_cast<long long>((exponent > 0 ? exponent : 1) + 925) << 52);
}

// The rank that completes `mass` of the sum of all scores.
//
// Sums taken side by side have the bits of the sum in order if both are exact. All positive scores
// are multiples of the last place of the smallest, so a sum is exact while it is below 2^53 of
// those; half of that leaves room for the rounding of a total that is not. Scores that sum to 1 may
// be as small as 2^-29. Others are summed by one thread, at some 20 cycles a score.
template <int Threads>
VTP_DEVICE int mass_knee(const FiniteRun& y, double mass, KneeScratch<Threads>& scratch) {
  constexpr int kWarps = Threads / kWarp;
  const auto n = static_cast<unsigned>(y.n), share = (n + Threads - 1) / Threads;
  const unsigned begin = threadIdx.x * share, end = begin + share < n ? begin + share : n;
  double own = 0.0;
  uint32_t smallest = 0xffffffffu;
  for (unsigned i = begin; i < end; ++i) {
    own = __dadd_rn(own, weight(y, static_cast<int>(i)));
    smallest = y.keys[i] > kZeroKey ? y.keys[i] : smallest;  // they descend
  }
  const double before = warp_exclusive_sum(own);
  smallest = warp_min(smallest);
  if (lane_id() == kWarp - 1) {
    scratch.doubles.per_warp[warp_id()] = before + own;
    scratch.keys.per_warp[warp_id()] = smallest;
  }
  __syncthreads();
  const double of_warp = lane_id() < kWarps ? scratch.doubles.per_warp[lane_id()] : 0.0;
  const double total = warp_sum(of_warp);
  smallest = warp_min(scratch.keys.per_warp[lane_id() % kWarps]);
  if (!(total > 0.0)) return -1;

  if (total > largest_exact_sum(smallest)) {
    if (threadIdx.x == 0) scratch.knee = mass_knee_in_order(y, mass);
    __syncthreads();
    return scratch.knee;
  }
  const double target = __dmul_rn(mass, total);
  double held = warp_sum(lane_id() < warp_id() ? of_warp : 0.0) + before;
  int rank = kNoRank;
  for (unsigned i = begin; i < end && rank == kNoRank; ++i) {
    held = __dadd_rn(held, weight(y, static_cast<int>(i)));
    if (held >= target) rank = static_cast<int>(i);
  }
  const int first = first_rank(rank, scratch);
  return first == kNoRank ? -1 : first;
}

// The rank of the knee among n finite scores, given by descending keys; -1: there is none. Every
// thread of the block calls it and gets the answer.
template <int Threads>
VTP_DEVICE int find_knee(const Inflection& a, const uint32_t* keys, int n,
                         KneeScratch<Threads>& scratch) {
  if (n < 3) return -1;
  FiniteRun y = {keys, n, INFINITY};
  const bool clips =
      (a.rule == Rule::chord || a.rule == Rule::kneedle) && a.clip_quantile < 1.0;
  if (clips || a.rule == Rule::iqr) {
    // One thread: where float64 runs at a 64th of the speed, a block of them takes microseconds.
    if (threadIdx.x == 0) scratch.bound = clips ? quantile(y, a.clip_quantile) : upper_fence(y);
    __syncthreads();
  }
  if (clips) y.limit = scratch.bound;
  if (!(y(0) > y(n - 1))) return -1;
  switch (a.rule) {
    case Rule::chord:
      return chord_knee(y, chord_epsilon(a.curve.dtype), scratch);
    case Rule::kneedle:
      return kneedle_knee(y, a.sensitivity, scratch);
    case Rule::iqr:
      return iqr_knee(y, scratch.bound, scratch);
    case Rule::mass:
      return mass_knee(y, a.mass, scratch);
  }
  return -1;
}

}  // namespace vtp::cuda
