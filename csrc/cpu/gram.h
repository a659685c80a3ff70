// Rows in panels, one a lane, and their cosines, by tiles of two panels.
//
// A product is summed over blocks of kDepth channels, and these in turn, whatever tile it lies in:
// its bits depend on the two rows alone, and no sum crosses lanes.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int kPanel = 48;       // rows: a multiple of all vectors and tiles below
constexpr int64_t kDepth = 128;  // channels: a panel's block of floats takes 24 KB of L1

// A tile of sums fills the registers, but for a vector of each panel and a factor.
constexpr int kTileVectors = kVectorBytes == 64 ? 3 : kPanelVectors;
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 6;

// c[j][lane] += sum_k x[k][lane] * y[k][j]
template <class A, int V, int J>
VTP_INLINE void add_products(const A* x, const A* y, int64_t depth, A* c) {
  constexpr int kStep = kLanes<A>;
  Vec<A> sum[J][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> lanes[V];
    for (int v = 0; v < V; ++v) lanes[v] = load(x + k * kPanel + v * kStep);
    for (int j = 0; j < J; ++j) {
      const Vec<A> factor = splat(y[k * kPanel + j]);
      for (int v = 0; v < V; ++v) sum[j][v] = sum[j][v] + factor * lanes[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) {
      A* at = c + j * kPanel + v * kStep;
      store(at, load(at) + sum[j][v]);
    }
  }
}

// c[j][i] = <row i of panel x, row j of panel y> for `count` rows of y, rounded up to whole tiles.
template <class A, int J>
void multiply(const A* x, const A* y, int64_t count, int64_t channels, A* c) {
  constexpr int kStrip = kTileVectors * kLanes<A>;
  std::memset(c, 0, sizeof(A) * kPanel * ((count + J - 1) / J * J));
  for (int64_t k = 0; k < channels; k += kDepth) {
    const int64_t depth = std::min(kDepth, channels - k);
    for (int64_t j = 0; j < count; j += J) {
      for (int i = 0; i < kPanel; i += kStrip) {
        add_products<A, kTileVectors, J>(x + k * kPanel + i, y + k * kPanel + j, depth,
                                         c + j * kPanel + i);
      }
    }
  }
}

// <row, row> of a panel's rows, summed as in a tile: rows that are equal have one number for both
// squares and their product, and sqrt(s * s) is s, so their cosine is 1.
template <class A>
void square_rows(const A* x, int64_t channels, A* squares) {
  for (int i = 0; i < kPanel; i += kLanes<A>) {
    Vec<A> total = {};
    for (int64_t begin = 0; begin < channels; begin += kDepth) {
      const int64_t end = std::min(begin + kDepth, channels);
      Vec<A> sum = {};
      for (int64_t k = begin; k < end; ++k) {
        const Vec<A> lanes = load(x + k * kPanel + i);
        sum = sum + lanes * lanes;
      }
      total = total + sum;
    }
    store(squares + i, total);
  }
}

// dots[i] / sqrt(square * squares[i]) in place; 0 beside a row of zeros.
template <class A>
VTP_INLINE void to_cosines(A* dots, A square, const A* squares) {
  for (int i = 0; i < kPanel; i += kLanes<A>) {
    const Vec<A> norms = sqrt_of(load(squares + i) * square);
    store<A>(dots + i, norms == 0 ? Vec<A>{} : load(dots + i) / norms);
  }
}

// The power of two that brings a row's largest entry to about 1, so that no square overflows; 0
// where not all of it is finite.
template <class T>
VTP_INLINE Wide<T> scale_of(const T* row, int64_t channels) {
  using A = Wide<T>;
  constexpr int kMost = sizeof(A) == 4 ? 126 : 1022;  // 2^-kMost is not subnormal
  constexpr int kChains = 2;  // neither waits for the other
  Vec<A> tops[kChains] = {}, zeros[kChains] = {};
  int64_t c = 0;
  for (; c + kChains * kLanes<A> <= channels; c += kChains * kLanes<A>) {
    for (int chain = 0; chain < kChains; ++chain) {
      const Vec<A> x = load(row + c + chain * kLanes<A>);
      tops[chain] = larger<A>(tops[chain], x < 0 ? -x : x);
      zeros[chain] = zeros[chain] + x * 0;  // NaN once an entry is not finite
    }
  }
  const Vec<A> most = larger<A>(tops[0], tops[1]);
  A top = 0, zero = sum_lanes(zeros[0] + zeros[1]);
  for (int lane = 0; lane < kLanes<A>; ++lane) top = std::max<A>(top, most[lane]);
  for (; c < channels; ++c) {
    const A x = widen(row[c]);
    top = std::max(top, std::fabs(x));
    zero += x * 0;
  }
  if (zero != 0) return 0;
  int exponent = 0;
  std::frexp(top, &exponent);
  return std::ldexp(A{1}, -std::max(-kMost, std::min(kMost, exponent)));
}

// panel[c][lane] = the rows position[0 ... count), each times its scale; zeros in the other lanes.
template <class T>
void pack_panel(const T* rows, int64_t stride, const int32_t* position, const Wide<T>* scales,
                int64_t count, int64_t channels, Wide<T>* panel) {
  using A = Wide<T>;
  if (count < kPanel) std::memset(panel, 0, sizeof(A) * kPanel * channels);
  A row[kDepth];
  for (int64_t begin = 0; begin < channels; begin += kDepth) {
    const int64_t depth = std::min(kDepth, channels - begin);
    A* block = panel + begin * kPanel;
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t i = position[lane];
      widen_row(rows + i * stride + begin, depth, row);
      for (int64_t c = 0; c < depth; ++c) block[c * kPanel + lane] = row[c] * scales[i];
    }
  }
}

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
