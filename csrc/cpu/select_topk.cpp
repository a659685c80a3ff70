// Top-k of every row without a sort: a radix search finds the k-th largest key, one ascending pass emits
// the indices, so order and ties (smaller index first) come for free.
#include <algorithm>
#include <memory>

#include "half.h"
#include "ops.h"
#include "parallel.h"
#include "sortable.h"

namespace vtp::cpu {
namespace {

template <class Key>
struct Cut {
  Key key = 0;        // everything above is taken
  int64_t ties = 0;   // and this many, in index order, of what is equal
};

int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }
int highest_bit(uint64_t x) { return 63 - __builtin_clzll(x); }

// Where to cut `pool` (overwritten) so that exactly `need` keys, 0 < need <= size, are taken. Each round
// looks at the 8 bits below the highest one in which keys still differ: 576 attention weights share sign
// and most of the exponent, so two rounds usually do.
template <class Key>
Cut<Key> find_cut(Key* pool, int64_t size, int64_t need) {
  for (;;) {
    Key all = ~Key{0}, any = 0;
    for (int64_t i = 0; i < size; ++i) {
      all &= pool[i];
      any |= pool[i];
    }
    if (all == any) return {all, need};
    const int shift = std::max(0, highest_bit(static_cast<Key>(all ^ any)) - 7);

    int32_t histogram[256] = {};
    for (int64_t i = 0; i < size; ++i) ++histogram[(pool[i] >> shift) & 255];
    int digit = 255;
    for (; histogram[digit] < need; --digit) need -= histogram[digit];

    int64_t left = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key key = pool[i];
      pool[left] = key;
      left += static_cast<int>((key >> shift) & 255) == digit;
    }
    size = left;
  }
}

template <class Score>
void select_row(const SelectTopk& a, int64_t row) {
  using Wide = std::conditional_t<std::is_same_v<Score, double>, double, float>;
  using Key = decltype(sortable(Wide{}));
  constexpr uint8_t out = 0, competing = 1, kept = 2, nobody = 3;

  const auto scores = view_as<const Score>(a.scores);
  const int64_t length = scores.size[1];
  const auto threshold = static_cast<Wide>(a.threshold);
  const std::unique_ptr<Key[]> keys(new Key[length]), pool(new Key[length]);
  const std::unique_ptr<uint8_t[]> group(new uint8_t[length]);

  int64_t group_size[3] = {};
  for (int64_t i = 0; i < length; ++i) {
    const Wide score = widen(*scores.at(row, i));
    keys[i] = sortable(score);
    bool competes = !a.has_threshold || score > threshold;
    if (a.candidates) competes &= *a.candidates.at(row, i);
    group[i] = a.keep && *a.keep.at(row, i) ? kept : competes ? competing : out;
    ++group_size[group[i]];
  }

  // Kept rows are always taken, competitors as far as k and the capacity go; when the kept rows alone
  // fill the capacity, it is they who compete for it.
  const int64_t k = std::max<int64_t>(0, a.k[row * a.k_stride]);
  const int64_t count = std::min(group_size[kept] + std::min(group_size[competing], k), a.capacity);
  const bool crowded = group_size[kept] >= count;
  const uint8_t always = crowded ? nobody : kept, ranked = crowded ? kept : competing;
  const int64_t need = crowded ? count : count - group_size[kept];

  Cut<Key> cut;
  if (need == group_size[ranked]) {
    cut = {0, need};  // all of them
  } else if (need > 0) {
    int64_t size = 0;
    for (int64_t i = 0; i < length; ++i) {
      pool[size] = keys[i];
      size += group[i] == ranked;
    }
    cut = find_cut(pool.get(), size, need);
  }

  int64_t* indices = a.indices + row * a.capacity;
  int64_t taken = 0;
  for (int64_t i = 0; taken < count; ++i) {  // branch-free: the slot is overwritten until i is taken
    const bool tie = (group[i] == ranked) & (keys[i] == cut.key) & (cut.ties > 0);
    cut.ties -= tie;
    indices[taken] = i;
    taken += tie | (group[i] == always) | ((group[i] == ranked) & (keys[i] > cut.key));
  }
  std::fill(indices + count, indices + a.capacity, int64_t{-1});
  a.counts[row] = static_cast<int32_t>(count);
}

}  // namespace

void select_topk(const SelectTopk& a) {
  const auto rows = [&](auto type) {
    parallel(a.scores.size[0], 4 * a.scores.size[1],
             [&](int64_t row) { select_row<decltype(type)>(a, row); });
  };
  with_type(a.scores.dtype, rows);
}

}  // namespace vtp::cpu
