// The knee of every row's sorted curve. A transcription of vtp_kernels/reference.py, where the
// rules are explained: the same float64 operations in the same order, so the kept sets are equal
// bit for bit. This file must therefore be compiled without contraction to fused multiply-add.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "half.h"
#include "ops.h"
#include "parallel.h"
#include "sortable.h"

namespace vtp::cpu {
namespace {

template <class Key>
struct Ranked {
  Key key;
  int32_t index;
};

// Descending by key, equal keys in index order: byte-wise radix sort, skipping bytes all keys
// share. The result is in `items`; `other` is scratch of the same size.
template <class Key>
void sort_descending(std::unique_ptr<Ranked<Key>[]>& items, std::unique_ptr<Ranked<Key>[]>& other,
                     int64_t size) {
  constexpr int kDigits = sizeof(Key);
  int32_t histogram[kDigits][256] = {};
  for (int64_t i = 0; i < size; ++i) {
    for (int d = 0; d < kDigits; ++d) ++histogram[d][(items[i].key >> (8 * d)) & 255];
  }
  for (int d = 0; d < kDigits; ++d) {
    int32_t place[256];
    int32_t above = 0;
    for (int value = 255; value >= 0; --value) {
      place[value] = above;
      above += histogram[d][value];
    }
    if (histogram[d][(items[0].key >> (8 * d)) & 255] == size) continue;
    for (int64_t i = 0; i < size; ++i) other[place[(items[i].key >> (8 * d)) & 255]++] = items[i];
    std::swap(items, other);
  }
}

// y_0 ... y_{n-1}: the finite scores, descending; n > 0.

double quantile(const double* y, int64_t n, double q) {
  const double position = static_cast<double>(n - 1) * q;
  const double below = std::floor(position);
  const double t = position - below;
  const int64_t low_at = n - 1 - static_cast<int64_t>(below);
  const double low = y[low_at], high = y[std::max<int64_t>(low_at - 1, 0)];
  const double step = high - low;
  return t < 0.5 ? low + step * t : high - step * (1.0 - t);
}

int64_t chord(const double* y, int64_t n, double epsilon) {
  const double last = static_cast<double>(n - 1), whole_drop = y[0] - y[n - 1];
  double farthest = epsilon * std::max(std::fabs(y[0]), std::fabs(y[n - 1])) * last;
  int64_t knee = -1;
  for (int64_t i = 0; i < n; ++i) {
    const double distance = (y[0] - y[i]) * last - static_cast<double>(i) * whole_drop;
    if (distance > farthest) {
      farthest = distance;
      knee = i;
    }
  }
  return knee;
}

int64_t kneedle(const double* y, int64_t n, double sensitivity) {
  const double last = static_cast<double>(n - 1), low = y[n - 1], range = y[0] - low;
  const double margin = sensitivity * (1.0 / last);
  const auto difference = [&](int64_t i) {
    return (1.0 - (y[i] - low) / range) - static_cast<double>(i) / last;
  };
  int64_t last_max = -1, last_min = -1;
  double peak = 0.0, here = difference(0), before = here;
  for (int64_t i = 0; i + 1 < n; ++i) {
    const double after = difference(i + 1);
    if (here >= before && here >= after) {
      last_max = i;
      peak = here;
    }
    if (here <= before && here <= after) last_min = i;
    if (last_max > last_min && after < peak - margin) return last_max;
    before = here;
    here = after;
  }
  return -1;
}

int64_t iqr(const double* y, int64_t n) {
  const double q1 = quantile(y, n, 0.25), q3 = quantile(y, n, 0.75);
  const double fence = q3 + 1.5 * (q3 - q1);
  int64_t above = 0;
  while (above < n && y[above] > fence) ++above;
  return above - 1;
}

int64_t mass_holder(const double* y, int64_t n, double mass) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += std::max(y[i], 0.0);
  if (!(total > 0.0)) return -1;
  double held = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    held += std::max(y[i], 0.0);
    if (held >= mass * total) return i;
  }
  return -1;
}

int64_t find_knee(const Inflection& a, double* y, int64_t n) {
  if (n < 3) return -1;
  const bool shape_counts = a.rule == Rule::chord || a.rule == Rule::kneedle;
  if (shape_counts && a.clip_quantile < 1.0) {
    const double limit = quantile(y, n, a.clip_quantile);
    for (int64_t i = 0; i < n && y[i] > limit; ++i) y[i] = limit;
  }
  if (!(y[0] > y[n - 1])) return -1;
  switch (a.rule) {
    case Rule::chord:
      return chord(y, n, chord_epsilon(a.curve.dtype));
    case Rule::kneedle:
      return kneedle(y, n, a.sensitivity);
    case Rule::iqr:
      return iqr(y, n);
    case Rule::mass:
      return mass_holder(y, n, a.mass);
  }
  return -1;
}

template <class Score>
void inflection_row(const Inflection& a, int64_t row) {
  using Key = decltype(sortable(widen(Score{})));
  const auto curve = view_as<const Score>(a.curve);
  const int64_t length = curve.size[1];
  std::unique_ptr<Ranked<Key>[]> order(new Ranked<Key>[length]), scratch(new Ranked<Key>[length]);
  const auto score = [&](int64_t rank) { return widen(*curve.at(row, order[rank].index)); };
  for (int64_t i = 0; i < length; ++i) {
    order[i] = {sortable(widen(*curve.at(row, i))), static_cast<int32_t>(i)};
  }
  if (length > 0) sort_descending(order, scratch, length);

  int64_t above = 0, n = 0;  // scores of +inf, then the finite run
  while (above < length && score(above) == INFINITY) ++above;
  const std::unique_ptr<double[]> y(new double[length]);
  while (above + n < length && std::isfinite(score(above + n))) {
    y[n] = score(above + n);
    ++n;
  }
  const int64_t knee = find_knee(a, y.get(), n);
  const int64_t wanted = knee < 0 ? length : above + knee + 1;
  const int64_t count = std::min(std::max(wanted, a.min_keep), a.capacity);

  const std::unique_ptr<bool[]> chosen(new bool[length]());
  for (int64_t rank = 0; rank < count; ++rank) chosen[order[rank].index] = true;
  int64_t* indices = a.indices + row * a.capacity;
  int64_t taken = 0;
  for (int64_t i = 0; taken < count; ++i) {
    indices[taken] = i;
    taken += chosen[i];
  }
  std::fill(indices + count, indices + a.capacity, int64_t{-1});
  a.counts[row] = static_cast<int32_t>(count);
}

}  // namespace

void inflection(const Inflection& a) {
  const auto rows = [&](auto type) {
    parallel(a.curve.size[0], 16 * a.curve.size[1],
             [&](int64_t row) { inflection_row<decltype(type)>(a, row); });
  };
  with_type(a.curve.dtype, rows);
}

}  // namespace vtp::cpu
