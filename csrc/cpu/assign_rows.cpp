// The target of largest cosine for every candidate row. Targets lie side by side, one a lane, so a
// row's products need no horizontal step; the search goes lane by lane too, and ends with one pass
// over the lanes of a vector.
//
// A row's own norm is the same for all targets and does not change which of them is the best: only
// the products are divided, by the norms of the targets.
#include <algorithm>
#include <type_traits>

#include "bfloat_pairs.h"
#include "parallel.h"
#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int64_t kUnitRows = 24;  // a unit of work; a multiple of product()'s tiles
constexpr int64_t kSlice = 256;    // channels at a time: the rows of a unit take 24 KB of L1
constexpr int64_t kStride = kSlice + 16;  // of these rows, so that they do not share cache sets

// How rows are multiplied: a Factor holds so many channels of one.
template <class T>
struct OneByOne {
  using Factor = Wide<T>;
  static constexpr int64_t kChannels = 1;
  static constexpr Wide<T> kLeastSquare = 0;

  static VTP_INLINE void copy(const T* row, int64_t size, Factor* out) { widen_row(row, size, out); }

  template <int V>
  static VTP_INLINE void multiply(const Factor* x, const Factor* rows, int64_t size, Wide<T>* sums,
                                  bool add) {
    product<Wide<T>, V>(x, rows, kStride, 1, size, kUnitRows, sums, add);
  }
};

struct InPairs {
  using Factor = Pair;
  static constexpr int64_t kChannels = 2;
  static constexpr float kLeastSquare = VTP_ISA::kLeastSquare;

  static VTP_INLINE void copy(const bfloat16* row, int64_t size, Factor* out) {
    copy_pairs(row, size, out);
  }

  template <int V>
  static VTP_INLINE void multiply(const Factor* x, const Factor* rows, int64_t size, float* sums,
                                  bool add) {
    pair_product<V>(x, rows, kStride, size, kUnitRows, sums, add);
  }
};

template <class T>
VTP_INLINE Wide<T> sum_of_squares(const T* x, int64_t size) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>;
  Vec<A> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= size; i += 2 * kStep) {
    for (int half = 0; half < 2; ++half) {
      const Vec<A> part = load(x + i + half * kStep);
      sums[half] = sums[half] + part * part;
    }
  }
  A sum = sum_lanes(sums[0] + sums[1]);
  for (; i < size; ++i) sum += widen(x[i]) * widen(x[i]);
  return sum;
}

// Whether products have the bits they should: not so of rows that are too short, but for zeros.
template <class Products, class T>
VTP_INLINE bool fits(const T* row, int64_t size, Wide<T> square) {
  if (!(square < Products::kLeastSquare)) return true;
  for (int64_t i = 0; i < size; ++i) {
    if (widen(row[i]) != 0) return false;
  }
  return true;
}

// The targets of a sequence, in panels of V vectors of lanes.
template <class T, class Products, int V>
class Targets {
 public:
  using A = Wide<T>;
  using Factor = typename Products::Factor;
  using Int = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  static constexpr int64_t kWidth = V * kLanes<A>;

  Targets(int64_t count, int64_t dim)
      : count_(count),
        dim_(dim),
        factors_((dim + Products::kChannels - 1) / Products::kChannels),
        panels_((count + kWidth - 1) / kWidth),
        packed_(panels_ * factors_ * kWidth),
        inverse_(panels_ * kWidth),
        fits_(panels_) {}

  int64_t panels() const { return panels_; }

  // False where some target does not fit.
  bool pack(const AssignRows& a, int64_t b) const {
    const auto keys = view_as<const T>(a.keys);
    const int64_t length = a.keys.size[1];
    parallel(panels_, kWidth * dim_, [&](int64_t panel) {
      const Scratch<Factor> rows(kWidth * kSlice);
      const T* source[kWidth];
      A square[kWidth] = {};
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t t = panel * kWidth + lane;
        const int64_t row = t < count_ ? *a.targets.at(b, t) : -1;
        source[lane] = row >= 0 && row < length ? keys.at(b, row) : nullptr;
      }
      for (int64_t first = 0; first < dim_; first += kSlice) {
        const int64_t channels = std::min(kSlice, dim_ - first);
        const int64_t begin = first / Products::kChannels, size = factors_of(channels);
        for (int64_t lane = 0; lane < kWidth; ++lane) {
          Factor* row = rows + lane * size;
          if (source[lane]) {
            Products::copy(source[lane] + first, channels, row);
            square[lane] += sum_of_squares(source[lane] + first, channels);
          } else {
            std::fill(row, row + size, Factor{0});
          }
        }
        Factor* out = packed_ + (panel * factors_ + begin) * kWidth;
        for (int64_t d = 0; d < size; ++d) {
          for (int64_t lane = 0; lane < kWidth; ++lane) *out++ = rows[lane * size + d];
        }
      }
      fits_[panel] = true;
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const bool is_target = source[lane] && std::isfinite(square[lane]);
        const A inverse = square[lane] > 0 ? 1 / std::sqrt(square[lane]) : A{0};
        inverse_[panel * kWidth + lane] = is_target ? inverse : A{NAN};
        if (is_target) fits_[panel] &= fits<Products>(source[lane], dim_, square[lane]);
      }
    });
    return std::all_of(&fits_[0], &fits_[panels_], [](bool fits) { return fits; });
  }

  // products[panel][j][lane] += of `channels` channels from `first` on of `rows`, kStride apart
  void multiply(const Factor* rows, int64_t first, int64_t channels, A* products) const {
    const int64_t begin = first / Products::kChannels;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      Products::template multiply<V>(packed_ + (panel * factors_ + begin) * kWidth, rows,
                                     factors_of(channels), products + panel * kUnitRows * kWidth,
                                     first > 0);
    }
  }

  // The position of the target of largest cosine, the first of equals; -1: there is none.
  int64_t best(const A* products, int64_t j) const {
    constexpr int kStep = kLanes<A>;
    Vec<A> largest = splat<A>(-INFINITY);
    Ints<A> vector = Ints<A>{} - 1;  // which one of the lane's
    for (int64_t panel = 0; panel < panels_; ++panel) {
      for (int v = 0; v < V; ++v) {
        const Vec<A> cosine = load(products + (panel * kUnitRows + j) * kWidth + v * kStep) *
                              load(inverse_ + panel * kWidth + v * kStep);
        const Ints<A> is_larger = cosine > largest;  // not so for NaN: no target
        largest = is_larger ? cosine : largest;
        vector = is_larger ? Ints<A>{} + static_cast<Int>(panel * V + v) : vector;
      }
    }
    A top = -INFINITY;
    int64_t position = -1;
    for (int lane = 0; lane < kStep; ++lane) {
      if (vector[lane] < 0) continue;
      const int64_t here = int64_t{vector[lane]} * kStep + lane;
      if (largest[lane] > top || (largest[lane] == top && here < position)) {
        top = largest[lane];
        position = here;
      }
    }
    return position;
  }

 private:
  static int64_t factors_of(int64_t channels) {
    return (channels + Products::kChannels - 1) / Products::kChannels;
  }

  const int64_t count_, dim_, factors_, panels_;
  const Scratch<Factor> packed_;  // [panels, factors, kWidth]
  const Scratch<A> inverse_;      // [panels, kWidth]: of the norms, 0 of a zero row; NaN: no target
  const Scratch<bool> fits_;      // [panels]
};

// False where some row does not fit.
template <class T, class Products, int V>
bool assign_unit(const AssignRows& a, int64_t b, const Targets<T, Products, V>& targets,
                 const int32_t* rows, int64_t count) {
  using A = Wide<T>;
  const auto keys = view_as<const T>(a.keys);
  const int64_t dim = a.keys.size[2];
  const Scratch<typename Products::Factor> tile(kUnitRows * kStride);
  const Scratch<A> products(targets.panels() * kUnitRows * targets.kWidth);
  A square[kUnitRows] = {};
  if (dim == 0) std::fill_n(&products[0], targets.panels() * kUnitRows * targets.kWidth, A{0});
  for (int64_t first = 0; first < dim; first += kSlice) {
    const int64_t size = std::min(kSlice, dim - first);
    for (int64_t j = 0; j < kUnitRows; ++j) {
      const T* row = keys.at(b, rows[std::min(j, count - 1)]) + first;
      Products::copy(row, size, tile + j * kStride);
      square[j] += sum_of_squares(row, size);
    }
    targets.multiply(tile, first, size, products);
  }
  int64_t* assignment = a.assignment + b * a.keys.size[1];
  for (int64_t j = 0; j < count; ++j) {
    if (!fits<Products>(keys.at(b, rows[j]), dim, square[j])) return false;
    assignment[rows[j]] = std::isfinite(square[j]) ? targets.best(products, j) : -1;
  }
  return true;
}

// Writes -1, or a target's own position, and lists the rows that are left to assign; returns how
// many they are.
VTP_INLINE int64_t list_others(const AssignRows& a, int64_t b, int32_t* rows) {
  const int64_t length = a.keys.size[1];
  int64_t* assignment = a.assignment + b * length;
  std::fill(assignment, assignment + length, int64_t{-1});
  for (int64_t t = 0; t < a.targets.size[1]; ++t) {
    const int64_t row = *a.targets.at(b, t);
    if (row >= 0 && row < length) assignment[row] = t;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (assignment[i] < 0 && (!a.candidates || *a.candidates.at(b, i))) {
      rows[count++] = static_cast<int32_t>(i);
    }
  }
  return count;
}

// Assigns the rows of sequence b that are listed; false where not all of them and the targets fit.
template <class T, class Products, int V>
bool assign_listed(const AssignRows& a, int64_t b, const Targets<T, Products, V>& targets,
                   const int32_t* rows, int64_t count) {
  if (!targets.pack(a, b)) return false;
  const int64_t units = (count + kUnitRows - 1) / kUnitRows;
  const int64_t cost = kUnitRows * targets.panels() * V * (20 + a.keys.size[2] / 2);
  const Scratch<bool> fits(units);
  parallel(units, cost, [&](int64_t unit) {
    const int64_t first = unit * kUnitRows;
    fits[unit] = assign_unit(a, b, targets, rows + first, std::min(kUnitRows, count - first));
  });
  return std::all_of(&fits[0], &fits[units], [](bool fits) { return fits; });
}

template <class T, int V>
void assign(const AssignRows& a) {
  const int64_t width = a.targets.size[1], dim = a.keys.size[2];
  constexpr bool kMayPair = std::is_same_v<T, bfloat16>;
  const bool in_pairs = kMayPair && has_pair_products();
  const Targets<T, std::conditional_t<kMayPair, InPairs, OneByOne<T>>, V> paired(
      in_pairs ? width : 0, dim);
  const Targets<T, OneByOne<T>, V> targets(width, dim);
  const Scratch<int32_t> rows(a.keys.size[1]);
  for (int64_t b = 0; b < a.keys.size[0]; ++b) {
    const int64_t count = list_others(a, b, rows);
    if (count == 0) continue;
    if (in_pairs && assign_listed(a, b, paired, rows, count)) continue;
    assign_listed(a, b, targets, rows, count);
  }
}

}  // namespace

void assign_rows(const AssignRows& a) {
  with_type(a.keys.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t vectors = (a.targets.size[1] + kLanes<Wide<T>> - 1) / kLanes<Wide<T>>;
    if (vectors <= 1) {
      assign<T, 1>(a);
    } else if ((vectors + 1) / 2 % (kPanelVectors / 2) != 0) {  // wide panels would be emptier
      assign<T, 2>(a);
    } else {
      assign<T, kPanelVectors>(a);
    }
  });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
