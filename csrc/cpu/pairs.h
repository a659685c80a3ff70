// Cosines of single pairs of rows, as a choice asks for them that looks at few.
#pragma once

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int kTogether = 4;  // products whose additions hide each other's latency

// out[k] = <x[k], y[k]>, of whole vectors: bits depend on the two rows alone, and are those of
// round_row where the rows are one, so the cosine of equal rows is 1.
template <class T, int K>
VTP_INLINE void pair_products(const T* const (&x)[K], const T* const (&y)[K], int64_t channels,
                              float* out) {
  Float32s sums[K] = {};
  for (int64_t c = 0; c < channels; c += kLanes<float>) {
    for (int k = 0; k < K; ++k) sums[k] = sums[k] + load(x[k] + c) * load(y[k] + c);
  }
  for (int k = 0; k < K; ++k) out[k] = sum_lanes(sums[k]);
}

// Pairs that were asked for, and their cosines once they are measured.
template <class T>
class Pairs {
 public:
  // squares[i] = <row[i], row[i]>, as of pair_products.
  Pairs(const T* const* row, const float* squares, int64_t channels, int64_t most)
      : row_(row), squares_(squares), channels_(channels), x_(most), y_(most), cosines_(most) {}

  void clear() { size_ = 0; }
  int64_t size() const { return size_; }
  void ask(int64_t x, int64_t y) {
    x_[size_] = static_cast<int32_t>(x), y_[size_] = static_cast<int32_t>(y);
    ++size_;
  }

  int64_t x(int64_t n) const { return x_[n]; }
  float cosine(int64_t n) const { return cosines_[n]; }

  void measure(Team& team) {
    const int64_t units = (size_ + kTogether - 1) / kTogether;
    const int64_t work = std::max<int64_t>(1, kWorthSharing / (kTogether * channels_));
    team.run((units + work - 1) / work, [&](int64_t job) {
      for (int64_t unit = job * work; unit < std::min((job + 1) * work, units); ++unit) {
        measure_from(unit * kTogether);
      }
    });
  }

 private:
  static constexpr int64_t kWorthSharing = 16384;  // products of entries: half a microsecond

  void measure_from(int64_t first) {
    const T *x[kTogether], *y[kTogether];
    float products[kTogether];
    for (int k = 0; k < kTogether; ++k) {
      const int64_t n = std::min(first + k, size_ - 1);
      x[k] = row_[x_[n]], y[k] = row_[y_[n]];
    }
    pair_products(x, y, channels_, products);
    for (int64_t n = first; n < std::min(first + kTogether, size_); ++n) {
      const float norm = std::sqrt(squares_[x_[n]] * squares_[y_[n]]);
      cosines_[n] = norm == 0 ? 0.0f : products[n - first] / norm;
    }
  }

  const T* const* row_;
  const float* squares_;
  const int64_t channels_;
  int64_t size_ = 0;
  const Scratch<int32_t> x_, y_;
  const Scratch<float> cosines_;
};

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
