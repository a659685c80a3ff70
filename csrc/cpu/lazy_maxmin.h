// Max-min choice that looks at few cosines. Coarse ones of all pairs tell which rows are likely to be
// chosen and what is likely to be near them; what is chosen is told by float cosines alone. A row is
// out once one float cosine says that it is too near to something, and is chosen when all say that it
// is not.
//
// Coarse cosines know more of some rows than of others. Where they mislead, the number of float ones
// grows, and beyond a limit all pairs are multiplied instead. Tiles sum a product in another order: of
// rows that tie but for rounding another may be chosen then, as it may with a larger k.
//
// Measured with signs as rows, N = 576, k = 64, C = 4096, on one core of an EPYC with a 512-bit
// datapath: of 3.2 ms 0.4 go to scales and rounding, 1.8 to coarse cosines, near the peak of its byte
// products, 0.8 to 4,000 float ones, and 0.2 to finding out which.
#pragma once

#include <algorithm>
#include <limits>

#include "best.h"
#include "pairs.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

template <class T>
class LazyMaxmin {
 public:
  struct Rows {
    const T* const* row;    // of `size` active rows, all finite
    const uint8_t* open;    // may be chosen; the others are anchors
    const float* squares;   // <row, row>, as of round_row and pair_products
    const float* coarse;    // cosines [size, width], -inf of a row and itself and beyond `size`
    int64_t size, width, stride, channels;  // width: whole panels
  };

  LazyMaxmin(const Rows& rows, int64_t most_chosen)
      : rows_(rows),
        left_(rows.size * rows.size / kShare),
        bound_(rows.width),
        near_(rows.width),
        near_at_(rows.width),
        pairs_(rows.row, rows.squares, rows.channels, 2 * rows.width),
        known_distances_(rows.width),
        most_chosen_(most_chosen),
        compared_(most_chosen * rows.width),
        chosen_(most_chosen) {}

  // The rows chosen, after the anchors, are chosen()[anchors ...]; `first` is -1 for the farthest.
  // False: more cosines would be looked at than pays, nothing is chosen.
  bool run(int64_t first, int64_t anchors, int64_t steps) {
    bool done = false;
    Team::with([&](Team& team) {
      team_ = &team;
      done = choose(first, anchors, steps);
    });
    return done;
  }

  const int32_t* chosen() const { return chosen_; }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int64_t kShare = 16;  // one product takes as long as so many in tiles of them do

  bool choose(int64_t first, int64_t anchors, int64_t steps) {
    std::memset(compared_, 0, most_chosen_ * rows_.width);
    for (int64_t i = 0; i < rows_.width; ++i) {
      bound_[i] = i < rows_.size && rows_.open[i] ? kInfinity : -kInfinity;
      near_[i] = -kInfinity;
      near_at_[i] = -1;
    }
    for (int64_t i = 0; anchors > 0 && i < rows_.size; ++i) {
      if (!rows_.open[i]) add(i);
    }
    for (int64_t step = 0; step < steps; ++step) {
      int64_t next = first;
      if (step > 0 || anchors > 0) {
        next = farthest_of_chosen();
      } else if (first < 0) {
        next = farthest_of_all();
      }
      if (next < 0) return false;
      bound_[next] = -kInfinity;
      add(next);
      if (step == 0 && next == known_) know_all();
    }
    return true;
  }

  static bool beats(float distance, int64_t i, float other, int64_t j) {
    return distance > other || (distance == other && i < j);
  }

  float distance(int64_t n) const { return 1 - pairs_.cosine(n); }

  void measure() {
    left_ -= pairs_.size();
    pairs_.measure(*team_);
  }

  // --- the first ---

  // The row whose nearest other is farthest; -1: given up.
  int64_t farthest_of_all() {
    const Scratch<int32_t> nearest(rows_.width);
    const Scratch<float> gap(rows_.width);
    for (int64_t i = 0; i < rows_.width; ++i) {
      const float* coarse = rows_.coarse + i * rows_.stride;
      nearest[i] = i < rows_.size ? static_cast<int32_t>(first_of_largest(coarse)) : -1;
      gap[i] = i < rows_.size ? 1 - coarse[nearest[i]] : -kInfinity;
    }
    int64_t best = known_ = first_of_largest(gap);
    pairs_.clear();
    for (int64_t i = 0; i < rows_.size; ++i) {  // both of a row at once, which is read once then
      if (i == best) continue;
      pairs_.ask(i, best);
      pairs_.ask(i, nearest[i]);
    }
    measure();
    float farthest = kInfinity;
    for (int64_t n = 0; n < pairs_.size(); n += 2) {
      known_distances_[pairs_.x(n)] = distance(n);
      farthest = std::min(farthest, distance(n));
    }
    int64_t doubts = 0;
    const Scratch<int32_t> doubtful(rows_.size);
    for (int64_t n = 1; n < pairs_.size(); n += 2) {
      const int64_t i = pairs_.x(n);
      gap[i] = distance(n);
      doubtful[doubts] = static_cast<int32_t>(i);
      doubts += beats(distance(n), i, farthest, best);
    }
    for (int64_t n = 0; n < doubts && left_ >= 0; ++n) {
      const int64_t i = doubtful[n];
      const float least = nearest_distance(i, nearest[i], gap[i], farthest, best);
      if (beats(least, i, farthest, best)) farthest = least, best = i;
    }
    return left_ >= 0 ? best : -1;
  }

  // The distance of row i to its nearest other, which is `least` at most, that to row `nearest`;
  // or, once it does not beat `best`, what it is at most.
  float nearest_distance(int64_t i, int64_t nearest, float least, float farthest, int64_t best) {
    const Scratch<float> rest(rows_.width);
    std::memcpy(rest, rows_.coarse + i * rows_.stride, sizeof(float) * rows_.width);
    rest[nearest] = -kInfinity;
    while (left_ >= 0 && beats(least, i, farthest, best)) {
      pairs_.clear();
      while (pairs_.size() < kTogether) {
        const int64_t j = first_of_largest(rest);
        if (j < 0) break;
        rest[j] = -kInfinity;
        pairs_.ask(i, j);
      }
      if (pairs_.size() == 0) break;
      measure();
      for (int64_t n = 0; n < pairs_.size(); ++n) least = std::min(least, distance(n));
    }
    return least;
  }

  int64_t first_of_largest(const float* values) const {
    Best<float> best(-kInfinity);
    for (int64_t begin = 0; begin < rows_.width; begin += kPanel) {
      best.add_panel(begin, [&](int64_t i) { return load(values + i); });
    }
    return best.index();
  }

  // --- the others ---
  //
  // bound_: the smallest distance to what a row was compared with of what is chosen, -inf for rows
  // that are not open. near_: the largest coarse cosine with the rest of what is chosen, and near_at_
  // which of them that is; -inf and -1 where there is none.

  void add(int64_t row) {
    const int32_t at = static_cast<int32_t>(count_);
    chosen_[count_] = static_cast<int32_t>(row);
    ++count_;
    const float* coarse = rows_.coarse + row * rows_.stride;
    for (int64_t i = 0; i < rows_.width; ++i) {
      const bool nearer = coarse[i] > near_[i];
      near_[i] = nearer ? coarse[i] : near_[i];
      near_at_[i] = nearer ? at : near_at_[i];
    }
  }

  // All rows were compared with the first that was chosen.
  void know_all() {
    for (int64_t i = 0; i < rows_.size; ++i) {
      if (i == known_) continue;
      bound_[i] = known_distances_[i];
      mark(i);
    }
  }

  // Row i was compared with the nearest, or will be.
  void mark(int64_t i) {
    uint8_t* compared = compared_ + i * most_chosen_;
    const float* coarse = rows_.coarse + i * rows_.stride;
    compared[near_at_[i]] = 1;
    float near = -kInfinity;
    int32_t at = -1;
    for (int64_t t = 0; t < count_; ++t) {  // without branches, which nothing could foretell
      const float cosine = compared[t] ? -kInfinity : coarse[chosen_[t]];
      at = cosine > near ? static_cast<int32_t>(t) : at;
      near = cosine > near ? cosine : near;
    }
    near_[i] = near, near_at_[i] = at;
  }

  // The open row that is farthest from what is chosen; -1: given up.
  int64_t farthest_of_chosen() {
    int64_t best = likeliest();
    for (int64_t before = -1; near_at_[best] >= 0 && left_ >= 0;) {
      pairs_.clear();
      if (best == before) {  // so it will be chosen, most likely
        ask_all(best);
      } else {
        while (pairs_.size() < kTogether && near_at_[best] >= 0) ask(best);
      }
      compare();
      before = best, best = likeliest();
    }
    while (left_ >= 0) {
      pairs_.clear();
      const float farthest = bound_[best];
      for (int64_t begin = 0; begin < rows_.width; begin += kPanel) {
        int32_t some = 0;  // in one pass without branches: most panels have none
        for (int64_t i = begin; i < begin + kPanel; ++i) some |= bound_[i] >= farthest;
        for (int64_t i = begin; some && i < begin + kPanel; ++i) {
          if (bound_[i] < farthest) continue;
          if (near_at_[i] >= 0 && beats(bound_[i], i, farthest, best)) ask(i);
        }
      }
      if (pairs_.size() == 0) return best;
      compare();
      for (int64_t n = 0; n < pairs_.size(); ++n) {
        const int64_t i = pairs_.x(n);
        if (near_at_[i] < 0 && beats(bound_[i], i, bound_[best], best)) best = i;
      }
    }
    return -1;
  }

  int64_t likeliest() const {
    Best<float> best(-kInfinity);
    for (int64_t begin = 0; begin < rows_.width; begin += kPanel) {
      best.add_panel(begin, [&](int64_t i) {
        const Float32s bound = load(bound_ + i), guess = 1 - load(near_ + i);
        return guess < bound ? guess : bound;
      });
    }
    return best.index();
  }

  void ask(int64_t i) {
    pairs_.ask(i, chosen_[near_at_[i]]);
    mark(i);
  }

  void ask_all(int64_t i) {
    uint8_t* compared = compared_ + i * most_chosen_;
    for (int64_t t = 0; t < count_; ++t) {
      if (!compared[t]) pairs_.ask(i, chosen_[t]);
      compared[t] = 1;
    }
    near_[i] = -kInfinity, near_at_[i] = -1;
  }

  void compare() {
    measure();
    for (int64_t n = 0; n < pairs_.size(); ++n) {
      bound_[pairs_.x(n)] = std::min(bound_[pairs_.x(n)], distance(n));
    }
  }

  const Rows rows_;
  Team* team_ = nullptr;
  int64_t left_;  // so many products may still be made
  int64_t count_ = 0, known_ = -1;
  const Scratch<float> bound_, near_;
  const Scratch<int32_t> near_at_;
  Pairs<T> pairs_;
  const Scratch<float> known_distances_;  // of all other rows to row known_
  const int64_t most_chosen_;
  const Scratch<uint8_t> compared_;  // [width, chosen]
  const Scratch<int32_t> chosen_;
};

}  // namespace
}  // namespace VTP_ISA
}  // namespace vtp::cpu
