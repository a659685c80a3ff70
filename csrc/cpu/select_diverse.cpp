// Rows that differ: the cosines of all pairs first, each pair once, then a step for each that is
// chosen: one pass over its cosines, which also finds the next.
// Few of many rows are chosen from some cosines alone: by max-min distance with coarse ones as a guide.
#include <algorithm>
#include <limits>

#include "best.h"
#include "coarse.h"
#include "gram.h"
#include "lazy_dpp.h"
#include "lazy_maxmin.h"
#include "parallel.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

// Cosines of all pairs are kept for the steps up to so many bytes in one row of the batch, 16,384
// rows of floats. Beyond that a step multiplies its own.
constexpr int64_t kMostBytes = int64_t{1} << 30;
// A step that multiplies its own reads all rows, and takes so many times what tiles take for it:
// with fewer steps than rows / rows_per_step(bytes of all rows) that is the shorter way. Measured on
// an EPYC 9004, where 4 MB stay near a core, and 16 MB in the last cache.
VTP_INLINE int64_t rows_per_step(int64_t bytes) {
  return bytes <= int64_t{4} << 20 ? 4 : bytes <= int64_t{16} << 20 ? 10 : 32;
}
// Few cosines are looked at where no more than a share of the rows is kept or chosen, and channels are
// so many that products are what takes time.
constexpr int64_t kLazyShare = 4, kLazyChannels = 256, kMostLazyChannels = int64_t{1} << 17;
// And where the largest entries are so near to 1 that the rows need no scale: no square of theirs, and
// no product of two squares, overflows or vanishes.
constexpr double kPlainScale = 0x1p16;
// As many rows of the batch as fit into this are worked on together: more would leave the caches, and
// make the allocator ask for new pages.
constexpr int64_t kGroupBytes = int64_t{1} << 25;

// What there is to do for one row of the batch. A row of features is open where it is finite and
// competes, an anchor where it is finite and kept, and active if it is either.
struct Plan {
  int64_t active = 0, open = 0, anchors = 0;
  int64_t steps = 0;          // rows to choose by their cosines, at most
  int64_t odd = 0;            // rows to choose at last
  int64_t first = -1;         // the active row that maxmin begins with
  bool of_all_pairs = false;  // maxmin begins with the farthest
  bool keeps_cosines = false;
  bool is_lazy = false;

  VTP_INLINE int64_t panels() const { return (active + kPanel - 1) / kPanel; }
  VTP_INLINE int64_t tiles() const {
    return of_all_pairs || keeps_cosines ? panels() * (panels() + 1) / 2 : 0;
  }
};

enum State : uint8_t { kOut, kOdd, kTaken };  // of a row of features; odd ones compete

template <class T>
class SelectGroup {
 public:
  using A = Wide<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

  SelectGroup(const SelectDiverse& a, int64_t begin, int64_t size)
      : a_(a),
        features_(view_as<const T>(a.features)),
        begin_(begin),
        size_(size),
        length_(features_.size[1]),
        channels_(features_.size[2]),
        width_((length_ + kPanel - 1) / kPanel * kPanel),
        is_lazy_(may_be_lazy()),
        stride_(is_lazy_ && is_maxmin() ? coarse_stride(channels_) : 0),
        plans_(size),
        states_(size * length_),
        scales_(size * length_),
        positions_(size * width_),
        open_(size * width_),
        squares_(size * width_),
        rounded_(size * length_ * stride_),
        norms_(stride_ > 0 ? size * length_ : 0),
        lengths_(is_lazy_ ? size * length_ : 0) {}

  void run() const {
    measure();
    for (int64_t g = 0; g < size_; ++g) plans_[g] = planned(g);
    if constexpr (sizeof(A) == sizeof(float)) choose_lazily();
    bool steps = false, pairs = false, kept = false;
    for (int64_t g = 0; g < size_; ++g) {
      const Plan& plan = plans_[g];
      steps |= plan.steps > 0, pairs |= plan.of_all_pairs, kept |= plan.keeps_cosines;
    }
    const Scratch<A> packed(steps ? size_ * width_ * channels_ : 0);
    const Scratch<A> cosines(kept ? size_ * width_ * width_ : 0);
    const Scratch<A> largest(pairs ? size_ * width_ / kPanel * width_ : 0);
    pack(packed);
    multiply_pairs(packed, cosines, largest);
    parallel(size_, 1 + length_ * (1 + a_.capacity), [&](int64_t g) {
      const Plan& plan = plans_[g];
      const Cosines of{*this, g, packed + g * width_ * channels_, cosines + g * width_ * width_};
      if (plan.steps > 0 && a_.rule == Diversity::maxmin) {
        maxmin(g, of, largest + g * width_ / kPanel * width_);
      } else if (plan.steps > 0) {
        dpp(g, of);
      }
      emit(g);
    });
  }

 private:
  // The cosines of an active row and all others, as they were kept or multiplied now.
  struct Cosines {
    const SelectGroup& group;
    int64_t g;
    const A *packed, *kept;

    const A* row(int64_t j, A* space) const {
      const Plan& plan = group.plans_[g];
      if (plan.keeps_cosines) return kept + j * group.width_;
      const int64_t channels = group.channels_;
      const A* squares = group.squares_ + g * group.width_;
      const A* factors = packed + j / kPanel * kPanel * channels + j % kPanel;
      parallel(plan.panels(), 4 * channels, [&](int64_t p) {
        A* dots = space + p * kPanel;
        multiply<A, 1>(packed + p * kPanel * channels, factors, 1, channels, dots);
        to_cosines(dots, squares[j], squares + p * kPanel);
      });
      return space;
    }
  };

  bool is_maxmin() const { return a_.rule == Diversity::maxmin; }
  bool is_kept(int64_t g, int64_t i) const { return a_.keep && *a_.keep.at(begin_ + g, i); }
  bool competes(int64_t g, int64_t i) const {
    return (!a_.candidates || *a_.candidates.at(begin_ + g, i)) && !is_kept(g, i);
  }
  A relevance(int64_t g, int64_t i) const {
    return a_.relevance ? std::fabs(*view_as<const A>(a_.relevance).at(begin_ + g, i)) : A{1};
  }

  // Scales of all rows that compete or are kept, and these rounded while they are near the core.
  void measure() const {
    constexpr int64_t kUnit = 16;
    const int64_t units = (length_ + kUnit - 1) / kUnit;
    parallel(size_ * units, kUnit * (4 + channels_ / 8), [&](int64_t unit) {
      const int64_t g = unit / units, begin = unit % units * kUnit;
      for (int64_t i = begin; i < std::min(begin + kUnit, length_); ++i) {
        if (!competes(g, i) && !is_kept(g, i)) continue;
        const int64_t at = g * length_ + i;
        const T* row = features_.at(begin_ + g, i);
        scales_[at] = scale_of<T>(row, channels_);
        if (scales_[at] == 0) continue;
        if (stride_ > 0) {
          round(at, row);
        } else if (is_lazy_) {
          square(at, row);
        }
      }
    });
  }

  Plan planned(int64_t g) const {
    Plan plan;
    int64_t kept = 0, competing = 0;
    for (int64_t i = 0; i < length_; ++i) {
      const bool keep = is_kept(g, i), in = !keep && competes(g, i);
      uint8_t& state = states_[g * length_ + i];
      state = keep && kept < a_.capacity ? kTaken : in ? kOdd : kOut;
      kept += keep, competing += in;
      if (!(keep || in) || scales_[g * length_ + i] == 0) continue;
      if (in && !(relevance(g, i) <= std::numeric_limits<A>::max())) continue;
      if (in && i == a_.first) plan.first = plan.active;
      if (in) state = kOut;
      positions_[g * width_ + plan.active] = static_cast<int32_t>(i);
      open_[g * width_ + plan.active] = in;
      ++plan.active, plan.open += in, plan.anchors += keep;
    }
    const int64_t k = a_.k_per_row ? a_.k_per_row.at(begin_ + g) : a_.k;
    const int64_t room = std::max<int64_t>(0, a_.capacity - kept);
    const int64_t wanted = std::max<int64_t>(0, std::min({k, competing, room}));
    plan.steps = std::min(wanted, plan.open);
    plan.odd = is_maxmin() ? wanted - plan.steps : 0;
    if (is_maxmin() && plan.steps == plan.open) {  // all, without a look at them
      for (int64_t j = 0; j < plan.active; ++j) {
        if (open_[g * width_ + j]) take(g, j);  // of those kept, capacity may not hold all
      }
      plan.steps = 0;
    }
    if (plan.steps == 0) return plan;
    plan.of_all_pairs = is_maxmin() && plan.anchors == 0 && plan.first < 0;
    constexpr int64_t kBytes = sizeof(A);
    const int64_t few = plan.active / rows_per_step(plan.active * channels_ * kBytes);
    plan.keeps_cosines = width_ * width_ * kBytes <= kMostBytes &&
                         (plan.of_all_pairs || plan.anchors + plan.steps >= few);
    plan.is_lazy = (plan.keeps_cosines || !is_maxmin()) && may_be_lazy(g, plan);
    return plan;
  }

  int64_t wanted(int64_t g) const {
    return std::min(a_.k_per_row ? a_.k_per_row.at(begin_ + g) : a_.k, a_.capacity);
  }

  // Whether some row of the batch may be, before a look at any.
  bool may_be_lazy() const {
    for (int64_t g = 0; g < size_; ++g) {
      if (may_be_lazy(wanted(g))) return true;
    }
    return false;
  }

  // A row that wants k, whatever others want: alone it is as in its batch.
  bool may_be_lazy(int64_t k) const {
    constexpr int64_t kBytes = sizeof(A);
    if (kBytes != sizeof(float) || channels_ % kLanes<A> != 0 || channels_ < kLazyChannels ||
        k * kLazyShare > length_) {
      return false;
    }
    if (!is_maxmin()) return true;
    const bool begins = a_.first < 0 && !a_.keep;
    return kHasCoarse && channels_ <= kMostLazyChannels && width_ * width_ * kBytes <= kMostBytes &&
           (begins || k >= length_ / rows_per_step(length_ * channels_ * kBytes));
  }

  bool may_be_lazy(int64_t g, const Plan& plan) const {
    if (!may_be_lazy(wanted(g)) || (plan.anchors + plan.steps) * kLazyShare > plan.active) {
      return false;
    }
    for (int64_t j = 0; j < plan.active; ++j) {
      const A scale = scales_[g * length_ + positions_[g * width_ + j]];
      if (scale < 1 / kPlainScale || scale > kPlainScale) return false;
    }
    return true;
  }

  void round(int64_t at, const T* row) const {
    if constexpr (kHasCoarse && sizeof(A) == sizeof(float)) {
      int8_t* out = rounded_ + at * stride_;
      std::memset(out + channels_, 0, stride_ - channels_);
      lengths_[at] = round_row(row, channels_, most_coarse() * scales_[at], out);
      norms_[at] = coarse_norm(out, stride_);
    }
  }

  void square(int64_t at, const T* row) const {
    if constexpr (sizeof(A) == sizeof(float)) {
      pair_products<T, 1>({row}, {row}, channels_, lengths_ + at);
    }
  }

  // Leaves nothing to be done where it succeeds.
  void choose_lazily() const {
    if (!is_lazy_) return;
    const Scratch<const T*> rows(size_ * width_);
    for (int64_t g = 0; g < size_; ++g) {
      for (int64_t j = 0; plans_[g].is_lazy && j < plans_[g].active; ++j) {
        const int64_t at = g * width_ + j, i = positions_[at];
        rows[at] = features_.at(begin_ + g, i);
        squares_[at] = lengths_[g * length_ + i];
      }
    }
    if (!is_maxmin()) {
      parallel(size_, length_ * channels_, [&](int64_t g) {
        if (plans_[g].is_lazy) dpp_lazily(g, rows + g * width_);
      });
      return;
    }
    const Scratch<float> coarse(size_ * width_ * width_);
    compare_coarsely(coarse);
    parallel(size_, length_ * channels_, [&](int64_t g) {
      const int64_t at = g * width_;
      if (plans_[g].is_lazy) maxmin_lazily(g, rows + at, coarse + at * width_);
    });
  }

  void maxmin_lazily(int64_t g, const T* const* rows, const float* coarse) const {
    Plan& plan = plans_[g];
    const int64_t at = g * width_;
    LazyMaxmin<T> choice({rows, open_ + at, squares_ + at, coarse, plan.active,
                          plan.panels() * kPanel, width_, channels_},
                         plan.anchors + plan.steps);
    if (!choice.run(plan.first, plan.anchors, plan.steps)) return;
    for (int64_t n = 0; n < plan.steps; ++n) take(g, choice.chosen()[plan.anchors + n]);
    plan.steps = 0, plan.of_all_pairs = plan.keeps_cosines = false;
  }

  void dpp_lazily(int64_t g, const T* const* rows) const {
    Plan& plan = plans_[g];
    const int64_t at = g * width_;
    const Scratch<float> weight(plan.active);
    for (int64_t j = 0; j < plan.active; ++j) {
      weight[j] = open_[at + j] ? relevance(g, positions_[at + j]) : A{0};
    }
    LazyDpp<T> choice({rows, open_ + at, squares_ + at, weight, plan.active,
                       plan.panels() * kPanel, channels_, static_cast<float>(kNothingLeft)},
                      plan.anchors + plan.steps);
    const Scratch<int32_t> taken(plan.steps);
    const int64_t count = choice.run(plan.steps, taken);
    for (int64_t n = 0; n < count; ++n) take(g, taken[n]);
    plan.steps = 0, plan.keeps_cosines = false;
  }

  // Coarse cosines of all pairs, -inf of a row and itself and of what is no row.
  void compare_coarsely(float* coarse) const {
    const Scratch<const int8_t*> rounded(size_ * width_);
    const Scratch<CoarseNorm> norms(size_ * width_);
    const Scratch<int8_t> nothing(stride_);
    std::memset(nothing, 0, stride_);
    for (int64_t g = 0; g < size_; ++g) {
      const Plan& plan = plans_[g];
      for (int64_t j = 0; plan.is_lazy && j < plan.panels() * kPanel; ++j) {
        const int64_t at = g * width_ + j, i = j < plan.active ? positions_[at] : -1;
        rounded[at] = i < 0 ? nothing : rounded_ + (g * length_ + i) * stride_;
        norms[at] = i < 0 ? CoarseNorm{} : norms_[g * length_ + i];
      }
    }
    const int64_t panels = width_ / kPanel, pairs = panels * (panels + 1) / 2;
    parallel(size_ * pairs, kPanel * kPanel * stride_ / 128, [&](int64_t tile) {
      const int64_t g = tile / pairs;
      int64_t x = tile % pairs, y = 0;
      for (; x > y; ++y) x -= y + 1;
      const Plan& plan = plans_[g];
      if (!plan.is_lazy || y >= plan.panels()) return;
      float* cosines = coarse + g * width_ * width_;
      coarse_cosines(rounded + g * width_, norms + g * width_, stride_, x * kPanel, y * kPanel, kPanel,
                     cosines, width_);
      for (int64_t i = x * kPanel; i < (x + 1) * kPanel; ++i) {
        if (x == y) cosines[i * width_ + i] = kLowest;
        for (int64_t j = plan.active; j < (y + 1) * kPanel; ++j) cosines[i * width_ + j] = kLowest;
      }
    });
  }

  void pack(A* packed) const {
    const int64_t panels = width_ / kPanel;
    parallel(size_ * panels, 2 * kPanel * channels_, [&](int64_t unit) {
      const int64_t g = unit / panels, p = unit % panels;
      const Plan& plan = plans_[g];
      if (plan.steps == 0 || p >= plan.panels()) return;
      A* panel = packed + (g * width_ + p * kPanel) * channels_;
      pack_panel(features_.at(begin_ + g), features_.stride[1],
                 positions_ + g * width_ + p * kPanel, scales_ + g * length_,
                 std::min<int64_t>(kPanel, plan.active - p * kPanel), channels_, panel);
      square_rows<A>(panel, channels_, squares_ + g * width_ + p * kPanel);
    });
  }

  // Tiles of panels (x, y), x <= y: tile t of a row of the batch is in column x of row y.
  void multiply_pairs(const A* packed, A* cosines, A* largest) const {
    int64_t all = 0;
    for (int64_t g = 0; g < size_; ++g) all += plans_[g].tiles();
    parallel(all, kPanel * kPanel * channels_ / 32, [&](int64_t tile) {
      int64_t g = 0, y = 0;
      for (; tile >= plans_[g].tiles(); ++g) tile -= plans_[g].tiles();
      for (; tile > y; ++y) tile -= y + 1;
      multiply_tile(g, tile, y, packed + g * width_ * channels_, cosines + g * width_ * width_,
                    largest + g * width_ / kPanel * width_);
    });
  }

  // Writes the cosines of two panels, also transposed; or, for the farthest of all, the largest of
  // each row of one panel with the rows of the other: largest[panel][row].
  void multiply_tile(int64_t g, int64_t x, int64_t y, const A* packed, A* cosines,
                     A* largest) const {
    const Plan& plan = plans_[g];
    const A* squares = squares_ + g * width_;
    alignas(64) A tile[kPanel * kPanel];
    const int64_t rows_y = std::min<int64_t>(kPanel, plan.active - y * kPanel);
    multiply<A, kTileRows>(packed + x * kPanel * channels_, packed + y * kPanel * channels_, rows_y,
                           channels_, tile);
    for (int64_t j = 0; j < rows_y; ++j) {
      to_cosines(tile + j * kPanel, squares[y * kPanel + j], squares + x * kPanel);
    }
    if (plan.keeps_cosines) {
      for (int64_t j = 0; j < rows_y; ++j) {
        std::memcpy(cosines + (y * kPanel + j) * width_ + x * kPanel, tile + j * kPanel,
                    sizeof(A) * kPanel);
      }
      for (int64_t i = 0; x < y && i < kPanel; ++i) {
        A* row = cosines + (x * kPanel + i) * width_ + y * kPanel;
        for (int64_t j = 0; j < rows_y; ++j) row[j] = tile[j * kPanel + i];
      }
    }
    if (!plan.of_all_pairs) return;
    if (x == y) {  // a row is no other, and lanes without a row are none
      for (int64_t j = 0; j < rows_y; ++j) {
        tile[j * kPanel + j] = kLowest;
        std::fill(tile + j * kPanel + rows_y, tile + (j + 1) * kPanel, kLowest);
      }
    }
    A* of_x = largest + y * width_ + x * kPanel;
    A* of_y = largest + x * width_ + y * kPanel;
    std::fill(of_x, of_x + kPanel, kLowest);
    for (int64_t j = 0; j < rows_y; ++j) {
      Vec<A> most = splat(kLowest);
      for (int i = 0; i < kPanel; i += kLanes<A>) {
        const Vec<A> row = load(tile + j * kPanel + i);
        most = larger<A>(most, row);
        store<A>(of_x + i, larger<A>(load(of_x + i), row));
      }
      if (x == y) continue;
      of_y[j] = kLowest;
      for (int lane = 0; lane < kLanes<A>; ++lane) of_y[j] = std::max<A>(of_y[j], most[lane]);
    }
  }

  void take(int64_t g, int64_t j) const {
    states_[g * length_ + positions_[g * width_ + j]] = kTaken;
  }

  // score: the smallest distance to what is kept or chosen, -inf for rows that are not open.
  void maxmin(int64_t g, const Cosines& cosines, const A* largest) const {
    const Plan& plan = plans_[g];
    const uint8_t* open = open_ + g * width_;
    const int64_t size = plan.panels() * kPanel;
    const Scratch<A> score(size), space(size);
    for (int64_t i = 0; i < size; ++i) score[i] = i < plan.active && open[i] ? -kLowest : kLowest;
    int64_t next = plan.anchors > 0 ? -1 : plan.first >= 0 ? plan.first : farthest(plan, largest);
    for (int64_t j = 0; plan.anchors > 0 && j < plan.active; ++j) {
      if (!open[j]) next = come_closer(score, cosines.row(j, space), size);
    }
    for (int64_t step = 0; step < plan.steps; ++step) {
      take(g, next);
      score[next] = kLowest;
      if (step + 1 < plan.steps) next = come_closer(score, cosines.row(next, space), size);
    }
  }

  // The row whose nearest other is farthest.
  int64_t farthest(const Plan& plan, const A* largest) const {
    Best<A> best(kLowest);
    for (int64_t p = 0; p < plan.panels(); ++p) {
      best.add_panel(p * kPanel, [&](int64_t i) {
        Vec<A> most = splat(kLowest);
        for (int64_t q = 0; q < plan.panels(); ++q) {
          most = larger<A>(most, load(largest + q * width_ + i));
        }
        Vec<A> distance = 1 - most;
        for (int lane = 0; lane < kLanes<A>; ++lane) {
          if (i + lane >= plan.active) distance[lane] = kLowest;
        }
        return distance;
      });
    }
    return best.index();
  }

  // The smaller of each score and the distance to a row; returns where the largest is.
  static int64_t come_closer(A* score, const A* cosines, int64_t size) {
    Best<A> best(kLowest);
    for (int64_t begin = 0; begin < size; begin += kPanel) {
      best.add_panel(begin, [&](int64_t i) {
        const Vec<A> old = load(score + i), distance = 1 - load(cosines + i);
        const Vec<A> nearer = distance < old ? distance : old;
        store<A>(score + i, nearer);
        return nearer;
      });
    }
    return best.index();
  }

  // Greedy MAP with the relevance drawn out of L = diag(r) S diag(r): the rows of the Cholesky
  // factor are those of S, and what is left of a row's square is a share of its own.
  void dpp(int64_t g, const Cosines& cosines) const {
    const Plan& plan = plans_[g];
    const uint8_t* open = open_ + g * width_;
    const int64_t size = plan.panels() * kPanel;
    const Scratch<A> space(size), weight(size), left(size);
    const Scratch<A> factor((plan.anchors + plan.steps) * size);  // by panels: [panel][row][lane]
    for (int64_t i = 0; i < size; ++i) {
      const bool in = i < plan.active && open[i];
      weight[i] = in ? relevance(g, positions_[g * width_ + i]) : A{0};
      left[i] = i < plan.active && squares_[g * width_ + i] > 0 ? 1 : 0;
    }
    const Determinant d{plan.anchors + plan.steps, size, weight, left, factor};
    int64_t rows = 0;
    for (int64_t j = 0; j < plan.active; ++j) {
      if (!open[j] && left[j] > d.least()) d.condition(rows++, j, cosines.row(j, space));
    }
    int64_t next = d.largest_gain();
    for (int64_t step = 0; step < plan.steps && next >= 0; ++step) {
      take(g, next);
      weight[next] = 0;
      if (step + 1 < plan.steps) next = d.condition(rows++, next, cosines.row(next, space));
    }
  }

  struct Determinant {
    int64_t most_rows, size;
    A *weight, *left, *factor;  // weight 0: does not compete

    static A least() { return static_cast<A>(kNothingLeft); }

    VTP_INLINE Vec<A> gain(int64_t i) const {
      const Vec<A> share = load(left + i), w = load(weight + i), none = splat(A{-1});
      const Vec<A> all = w > 0 ? w * sqrt_of(share) : none;
      return share > least() ? all : none;
    }

    // -1 where none competes.
    int64_t largest_gain() const {
      Best<A> best(-1);
      for (int64_t begin = 0; begin < size; begin += kPanel) {
        best.add_panel(begin, [&](int64_t i) { return gain(i); });
      }
      return best.index();
    }

    // Adds row j to those chosen, `rows` so far; returns where the largest gain is then.
    int64_t condition(int64_t rows, int64_t j, const A* cosines) const {
      const Scratch<A> share(rows);
      const A* column = factor + j / kPanel * kPanel * most_rows + j % kPanel;
      for (int64_t t = 0; t < rows; ++t) share[t] = column[t * kPanel];
      const A pivot = std::sqrt(left[j]);
      Best<A> best(-1);
      for (int64_t begin = 0; begin < size; begin += kPanel) {
        A* panel = factor + begin * most_rows;
        add_row(panel, rows, share, cosines + begin, pivot, left + begin);
        best.add_panel(begin, [&](int64_t i) { return gain(i); });
      }
      return best.index();
    }

    static VTP_INLINE void add_row(A* panel, int64_t rows, const A* share, const A* cosines, A pivot,
                                   A* left) {
      constexpr int kStep = kLanes<A>, kVectors = 3;
      for (int i = 0; i < kPanel; i += kVectors * kStep) {
        Vec<A> rest[kVectors];
        for (int v = 0; v < kVectors; ++v) rest[v] = load(cosines + i + v * kStep);
        for (int64_t t = 0; t < rows; ++t) {
          const Vec<A> factor = splat(share[t]);
          for (int v = 0; v < kVectors; ++v) {
            rest[v] = rest[v] - factor * load(panel + t * kPanel + i + v * kStep);
          }
        }
        for (int v = 0; v < kVectors; ++v) {
          const Vec<A> row = rest[v] / pivot;
          store<A>(panel + rows * kPanel + i + v * kStep, row);
          store<A>(left + i + v * kStep, load(left + i + v * kStep) - row * row);
        }
      }
    }
  };

  // What was taken, after the odd rows that maxmin takes last.
  void emit(int64_t g) const {
    uint8_t* state = states_ + g * length_;
    int64_t odd = plans_[g].odd;
    int64_t* indices = a_.indices + (begin_ + g) * a_.capacity;
    int64_t count = 0;
    for (int64_t i = 0; i < length_; ++i) {
      const bool last = state[i] == kOdd && odd > 0;
      odd -= last;
      if (last || state[i] == kTaken) indices[count++] = i;
    }
    std::fill(indices + count, indices + a_.capacity, int64_t{-1});
    a_.counts[begin_ + g] = static_cast<int32_t>(count);
  }

  const SelectDiverse& a_;
  const View<const T, 3> features_;
  const int64_t begin_, size_, length_, channels_;
  const int64_t width_;   // rows in whole panels
  const bool is_lazy_;    // some row of the batch may be
  const int64_t stride_;  // of rounded rows; 0 where there are none
  const Scratch<Plan> plans_;
  const Scratch<uint8_t> states_;
  const Scratch<A> scales_;           // by row of features
  const Scratch<int32_t> positions_;  // of active rows, ascending
  const Scratch<uint8_t> open_;       // by active row
  const Scratch<A> squares_;
  const Scratch<int8_t> rounded_;     // by row of features, as the next two
  const Scratch<CoarseNorm> norms_;
  const Scratch<float> lengths_;      // <row, row> of floats
};

}  // namespace

void select_diverse(const SelectDiverse& a) {
  with_type(a.features.dtype, [&](auto type) {
    using T = decltype(type);
    const auto [batch, length, channels] = a.features.size;
    const int64_t bytes = static_cast<int64_t>(sizeof(Wide<T>)) * length * (channels + length);
    const int64_t together = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, bytes));
    for (int64_t begin = 0; begin < batch; begin += together) {
      SelectGroup<T>(a, begin, std::min(together, batch - begin)).run();
    }
  });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
