// Top-k of every row without a sort: a binary search over the bits of sortable keys finds the k-th
// largest, then one ascending pass emits the indices, so order and ties (smaller index first) come
// for free. A step of the search is a vectorised count, 10,000 keys in some 0.3 us, and about
// log2(S) steps past the bits that all keys share usually do.
#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "simd.h"
#include "sortable.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

template <class Key>
int32_t count_from(const Key* keys, int32_t size, Key lowest) {
  Key count = 0;  // as wide as a key: one vector register counts a whole vector of comparisons
  for (int32_t i = 0; i < size; ++i) count += keys[i] >= lowest;
  return static_cast<int32_t>(count);
}

template <class Key>
struct Cut {
  Key lowest;    // keys from here on are taken
  int32_t ties;  // of the keys equal to `lowest` only so many, those of smallest index; -1: all
};

// Where to cut so that exactly `need` keys, 0 < need <= size, are taken.
template <class Key>
Cut<Key> find_cut(const Key* keys, int32_t size, int32_t need) {
  Key all = ~Key{0}, any = 0;
  for (int32_t i = 0; i < size; ++i) {
    all &= keys[i];
    any |= keys[i];
  }
  Key lowest = all, bit = Key{1} << (8 * sizeof(Key) - 1);
  while (bit != 0 && (bit & (all ^ any)) == 0) bit >>= 1;
  lowest &= ~(bit ? bit | (bit - 1) : Key{0});
  for (; bit != 0; bit >>= 1) {
    const int32_t count = count_from<Key>(keys, size, lowest | bit);
    if (count == need) return {static_cast<Key>(lowest | bit), -1};
    if (count > need) lowest |= bit;
  }
  const int32_t above = lowest == ~Key{0} ? 0 : count_from<Key>(keys, size, lowest + 1);
  return {lowest, need - above};
}

// A row's scores as keys: 0 for tokens that do not compete, all ones for those that are kept.
template <class Score>
class SelectRow {
 public:
  using Value = Wide<Score>;
  using Key = decltype(sortable(Value{}));

  SelectRow(const SelectTopk& a, int64_t row)
      : a_(a), row_(row), size_(static_cast<int32_t>(a.scores.size[1])), keys_(size_) {}

  void run() const {
    rank_competitors();
    int32_t competing = count_from<Key>(keys_, size_, 1), kept = 0;
    if (a_.keep) {
      const MaskByte* keep = a_.keep.at(row_);
      int32_t both = 0;
      for (int32_t i = 0; i < size_; ++i) {
        kept += keep[i];
        both += keep[i] & (keys_[i] != 0);
      }
      competing -= both;
    }
    const int64_t k = std::max<int64_t>(0, a_.k_per_row ? a_.k_per_row.at(row_) : a_.k);
    const int64_t wanted = kept + std::min<int64_t>(competing, k);
    const int32_t count = static_cast<int32_t>(std::min(wanted, a_.capacity));
    if (a_.keep) place_kept(kept > count);
    emit(count);
  }

 private:
  void rank_competitors() const {
    const Score* scores = view_as<const Score>(a_.scores).at(row_);
    for (int32_t i = 0; i < size_; ++i) keys_[i] = sortable(widen(scores[i]));
    if (a_.has_threshold) {
      const Value threshold = static_cast<Value>(a_.threshold);
      for (int32_t i = 0; i < size_; ++i) keys_[i] = widen(scores[i]) > threshold ? keys_[i] : 0;
    }
    if (a_.candidates) {
      const MaskByte* candidate = a_.candidates.at(row_);
      for (int32_t i = 0; i < size_; ++i) keys_[i] = candidate[i] ? keys_[i] : 0;
    }
  }

  // Kept rows come before all others; where they alone exceed the capacity they compete for it.
  void place_kept(bool crowded) const {
    const Score* scores = view_as<const Score>(a_.scores).at(row_);
    const MaskByte* keep = a_.keep.at(row_);
    if (crowded) {
      for (int32_t i = 0; i < size_; ++i) keys_[i] = keep[i] ? sortable(widen(scores[i])) : 0;
    } else {
      for (int32_t i = 0; i < size_; ++i) keys_[i] = keep[i] ? ~Key{0} : keys_[i];
    }
  }

  // The indices of the `count` largest keys.
  void emit(int32_t count) const {
    int64_t* indices = a_.indices + row_ * a_.capacity;
    std::fill(indices + count, indices + a_.capacity, int64_t{-1});
    a_.counts[row_] = count;
    if (count == 0) return;
    Cut<Key> cut = find_cut<Key>(keys_, size_, count);
    int32_t taken = 0;  // branch-free: a slot is overwritten until its index is taken
    if (cut.ties < 0) {
      for (int32_t i = 0; taken < count; ++i) {
        indices[taken] = i;
        taken += keys_[i] >= cut.lowest;
      }
    } else {
      for (int32_t i = 0; taken < count; ++i) {
        const bool tie = (keys_[i] == cut.lowest) & (cut.ties > 0);
        cut.ties -= tie;
        indices[taken] = i;
        taken += tie | (keys_[i] > cut.lowest);
      }
    }
  }

  const SelectTopk& a_;
  const int64_t row_;
  const int32_t size_;
  const Scratch<Key> keys_;
};

}  // namespace

void select_topk(const SelectTopk& a) {
  with_type(a.scores.dtype, [&](auto type) {
    parallel(a.scores.size[0], 2 * a.scores.size[1],
             [&](int64_t row) { SelectRow<decltype(type)>(a, row).run(); });
  });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
