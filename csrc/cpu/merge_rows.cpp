// Every target row merged with its group. The groups are listed first, by counting; then each is
// added up in ascending order of rows, a piece of its channels at a time, which stays in L1. Every
// row is read once.
#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int64_t kPiece = 2048;  // channels

// The rows of sequence b by group, ascending: those of group t are member[start[t] ... start[t + 1]).
VTP_INLINE void list_members(const MergeRows& a, int64_t b, int32_t* start, int32_t* member) {
  const int64_t length = a.features.size[1], count = a.targets.size[1];
  const Scratch<int32_t> group(length), next(count + 1);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t assigned = *a.assignment.at(b, i);
    group[i] = static_cast<int32_t>(assigned >= 0 && assigned < count ? assigned : count);
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = *a.targets.at(b, t);
    if (row >= 0 && row < length) group[row] = static_cast<int32_t>(t);
  }
  std::fill_n(&next[0], count + 1, 0);
  for (int64_t i = 0; i < length; ++i) ++next[group[i]];
  int32_t listed = 0;
  for (int64_t t = 0; t <= count; ++t) {
    start[t] = listed;
    listed += next[t];
    next[t] = start[t];
  }
  for (int64_t i = 0; i < length; ++i) member[next[group[i]]++] = static_cast<int32_t>(i);
}

// sum[i] += weight * row[i]
template <class T>
VTP_INLINE void add_row(const T* row, Wide<T> weight, int64_t size, Wide<T>* sum) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>;
  const Vec<A> factor = splat(weight);
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) store(sum + i, load(sum + i) + factor * load(row + i));
  for (; i < size; ++i) sum[i] += weight * widen(row[i]);
}

// The same with four rows, one after the other, of weight 1.
template <class T>
VTP_INLINE void add_four_rows(const T* const (&row)[4], int64_t size, Wide<T>* sum) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>;
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    Vec<A> s = load(sum + i);
    for (int r = 0; r < 4; ++r) s = s + load(row[r] + i);
    store(sum + i, s);
  }
  for (; i < size; ++i) {
    for (int r = 0; r < 4; ++r) sum[i] += widen(row[r][i]);
  }
}

// Channels [first, first + size) of group t of sequence b.
template <class T>
class Piece {
 public:
  using A = Wide<T>;

  Piece(const MergeRows& a, int64_t b, int64_t t, int64_t first, int64_t size)
      : a_(a), features_(view_as<const T>(a.features)), b_(b), first_(first), size_(size) {
    const int64_t count = a.targets.size[1], channels = a.features.size[2];
    out_ = static_cast<T*>(a.merged) + (b * count + t) * channels + first;
    target_ = *a.targets.at(b, t);
  }

  void merge(const int32_t* members, int64_t count) {
    if (target_ < 0 || target_ >= a_.features.size[1]) {
      std::memset(static_cast<void*>(out_), 0, size_ * sizeof(T));
      return;
    }
    add(members, count);
    finish();
  }

 private:
  const T* row(int64_t i) const { return features_.at(b_, i) + first_; }

  void add(const int32_t* members, int64_t count) {
    std::fill(sum_, sum_ + size_, A{0});
    const T* waiting[4];
    int waits = 0;
    for (int64_t m = 0; m < count; ++m) {
      if (a_.mode == MergeMode::weighted) {
        const A weight = *view_as<const A>(a_.weights).at(b_, members[m]);
        add_row<T>(row(members[m]), weight, size_, sum_);
        total_ += weight;
      } else if (a_.mode == MergeMode::mean || members[m] != target_) {
        waiting[waits++] = row(members[m]);
        total_ += 1;
        if (waits == 4) add_four_rows<T>(waiting, size_, sum_), waits = 0;
      }
    }
    for (int w = 0; w < waits; ++w) add_row<T>(waiting[w], A{1}, size_, sum_);
  }

  void finish() {
    if (!(total_ > 0)) {
      std::memcpy(static_cast<void*>(out_), row(target_), size_ * sizeof(T));
      return;
    }
    if (a_.mode == MergeMode::add_mean) {
      const T* target = row(target_);
      for (int64_t i = 0; i < size_; ++i) narrow(widen(target[i]) + sum_[i] / total_, out_[i]);
    } else {
      for (int64_t i = 0; i < size_; ++i) narrow(sum_[i] / total_, out_[i]);
    }
  }

  const MergeRows& a_;
  const View<const T, 3> features_;
  const int64_t b_, first_, size_;
  int64_t target_;
  T* out_;
  A total_ = 0;
  alignas(64) A sum_[kPiece];
};

template <class T>
void merge(const MergeRows& a) {
  const int64_t batch = a.features.size[0], length = a.features.size[1],
                channels = a.features.size[2], count = a.targets.size[1];
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  const Scratch<int32_t> starts(batch * (count + 1)), members(batch * length);
  parallel(batch, 4 * (length + count), [&](int64_t b) {
    list_members(a, b, starts + b * (count + 1), members + b * length);
  });
  const int64_t rows = length / std::max<int64_t>(count, 1) + 1;  // of a group, on average
  parallel(batch * count * pieces, rows * std::min(channels, kPiece) / 8, [&](int64_t unit) {
    const int64_t first = unit % pieces * kPiece, group = unit / pieces;
    const int64_t b = group / count, t = group % count;
    const int32_t* start = starts + b * (count + 1) + t;
    Piece<T>(a, b, t, first, std::min(kPiece, channels - first))
        .merge(members + b * length + start[0], start[1] - start[0]);
  });
}

}  // namespace

void merge_rows(const MergeRows& a) {
  with_type(a.features.dtype, [&](auto type) { merge<decltype(type)>(a); });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
