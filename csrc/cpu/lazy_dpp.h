// Greedy MAP of a determinant that looks at few cosines. What is left of a row only shrinks as
// others are chosen, so what it gained when it was last looked at bounds what it gains now. A row is
// conditioned on what was chosen since only while that bound beats the best that is known: those
// chosen, and all they leave, are to the bit what conditioning all rows in every step would give.
//
// In the worst case all rows are: then still only `steps` of each row's cosines are multiplied.
#pragma once

#include <algorithm>

#include "best.h"
#include "pairs.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

template <class T>
class LazyDpp {
 public:
  struct Rows {
    const T* const* row;   // of `size` active rows, all finite
    const uint8_t* open;   // may be chosen; the others are anchors
    const float* squares;  // <row, row>, as of pair_products
    const float* weight;   // |relevance| of open rows
    int64_t size, width, channels;  // width: whole panels
    float least;           // of which no more is left is out
  };

  LazyDpp(const Rows& rows, int64_t most_chosen)
      : rows_(rows),
        stride_((most_chosen + kLanes<float> - 1) / kLanes<float> * kLanes<float>),
        left_(rows.size),
        gain_(rows.width),
        depth_(rows.size),
        chosen_(most_chosen),
        pivot_(most_chosen),
        factor_(rows.size * stride_),
        pairs_(rows.row, rows.squares, rows.channels,
               std::max(most_chosen, kTogether * rows.size)) {}

  // chosen()[i] are the rows chosen, in order, of which there are as many as it returns.
  int64_t run(int64_t steps, int32_t* taken) {
    int64_t count = 0;
    Team::with([&](Team& team) {
      begin(team);
      for (int64_t next; count < steps && (next = largest_gain(team)) >= 0;) {
        taken[count++] = static_cast<int32_t>(next);
        if (count < steps) add(next);
      }
    });
    return count;
  }

 private:
  static constexpr float kOut = -1;  // a gain of rows that do not compete
  static constexpr int kLeaders = 4;

  void begin(Team& team) {
    for (int64_t i = 0; i < rows_.width; ++i) gain_[i] = kOut;
    for (int64_t i = 0; i < rows_.size; ++i) {
      left_[i] = rows_.squares[i] > 0 ? 1 : 0;
      depth_[i] = 0;
      rate(i);
    }
    for (int64_t i = 0; i < rows_.size; ++i) {
      if (rows_.open[i]) continue;
      condition(i, team);
      if (left_[i] > rows_.least) add(i);
    }
  }

  void rate(int64_t i) {
    const float weight = rows_.open[i] ? rows_.weight[i] : 0.0f;
    const bool competes = weight > 0 && left_[i] > rows_.least;
    gain_[i] = competes ? weight * std::sqrt(left_[i]) : kOut;
  }

  bool is_known(int64_t i) const { return depth_[i] == count_; }

  bool beats(int64_t i, int64_t j) const {
    return gain_[i] > gain_[j] || (gain_[i] == gain_[j] && i < j);
  }

  // Row i, which is known, is chosen: its part of the factor is the chosen one's.
  void add(int64_t i) {
    gain_[i] = kOut;
    pivot_[count_] = std::sqrt(left_[i]);
    chosen_[count_++] = static_cast<int32_t>(i);
  }

  // The cosines of row i and the next of those chosen that it was not conditioned on.
  void ask(int64_t i, int64_t most) {
    const int64_t end = std::min(count_, depth_[i] + most);
    for (int64_t t = depth_[i]; t < end; ++t) pairs_.ask(i, chosen_[t]);
  }

  void measure(Team& team) {
    pairs_.measure(team);
    for (int64_t n = 0; n < pairs_.size(); ++n) {
      const int64_t i = pairs_.x(n);
      condition(i, pairs_.cosine(n));
      if (n + 1 == pairs_.size() || pairs_.x(n + 1) != i) rate(i);
    }
  }

  void condition(int64_t i, Team& team) {
    pairs_.clear();
    ask(i, count_);
    measure(team);
  }

  // On one more of those chosen, to which it has this cosine.
  void condition(int64_t i, float cosine) {
    const int64_t t = depth_[i]++;
    float* row = factor_ + i * stride_;
    if (t % kLanes<float> == 0) store(row + t, Float32s{});
    const float* of_chosen = factor_ + chosen_[t] * stride_;
    Float32s shared = {};
    for (int64_t u = 0; u < t; u += kLanes<float>) {  // what is beyond t is zero in the row
      shared = shared + load(row + u) * load(of_chosen + u);
    }
    row[t] = (cosine - sum_lanes(shared)) / pivot_[t];
    left_[i] -= row[t] * row[t];
  }

  // -1 where none competes.
  int64_t largest_gain(Team& team) {
    int64_t best = first_of_largest();
    for (int leader = 0; best >= 0 && !is_known(best) && leader < kLeaders; ++leader) {
      condition(best, team);
      best = first_of_largest();
    }
    if (best < 0 || is_known(best)) return best;
    best = first_of_known();
    for (;;) {
      pairs_.clear();
      for (int64_t i = 0; i < rows_.size; ++i) {
        if (gain_[i] > kOut && !is_known(i) && (best < 0 || beats(i, best))) ask(i, kTogether);
      }
      if (pairs_.size() == 0) return best;
      measure(team);
      for (int64_t n = 0; n < pairs_.size(); ++n) {
        const int64_t i = pairs_.x(n);
        if (is_known(i) && gain_[i] > kOut && (best < 0 || beats(i, best))) best = i;
      }
    }
  }

  int64_t first_of_largest() const {
    Best<float> best(kOut);
    for (int64_t begin = 0; begin < rows_.width; begin += kPanel) {
      best.add_panel(begin, [&](int64_t i) { return load(gain_ + i); });
    }
    return best.index();
  }

  int64_t first_of_known() const {
    int64_t best = -1;
    for (int64_t i = 0; i < rows_.size; ++i) {
      if (is_known(i) && gain_[i] > kOut && (best < 0 || beats(i, best))) best = i;
    }
    return best;
  }

  const Rows rows_;
  const int64_t stride_;
  int64_t count_ = 0;  // of those chosen, anchors among them
  const Scratch<float> left_, gain_;  // as of `depth_` of those chosen
  const Scratch<int64_t> depth_;
  const Scratch<int32_t> chosen_;
  const Scratch<float> pivot_;
  const Scratch<float> factor_;  // [size, stride]: of row i the first depth_[i]
  Pairs<T> pairs_;
};

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
