// Attention received by every key, without an attention matrix in memory.
//
// A unit of work is up to 64 (head, query row) pairs that share a KV head, so K is read once for
// all of them; it yields one column of weights, summed over its rows. Few rows (the last token's)
// take dot products and a softmax along the keys. Many go in panels, one row per vector lane: a
// first sweep turns logits into exponentials relative to their block's maximum, while the rows'
// statistics run along; a second sweep scales each block to the true maximum and sum and adds up
// the lanes. With a given log-sum-exp the first sweep is enough. Last, the units of a batch row are
// reduced over heads.
#include <algorithm>

#include "panel.h"
#include "parallel.h"
#include "rows.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int64_t kUnitRows = 64;  // the widest panel of all instruction sets
constexpr int64_t kFewRows = 8;    // up to here dot products beat a panel of mostly idle lanes

// The keys of one batch row that must be read, ascending, and which of them want a score.
struct Keys {
  const int32_t* position;
  const bool* wanted;
  int64_t size;
};

struct Plan {
  int64_t batch, heads, rows, dim, length, group;
  int64_t unit_heads, group_units, units;  // heads a unit, units a KV head, units a batch row

  explicit Plan(const AttentionScores& a)
      : batch(a.query.size[0]),
        heads(a.query.size[1]),
        rows(a.query.size[2]),
        dim(a.query.size[3]),
        length(a.key.size[2]),
        group(heads / a.key.size[1]) {
    // A maximum over heads needs a column for every head.
    const int64_t fitting =
        a.head_reduce == HeadReduce::max ? 1 : kUnitRows / std::max<int64_t>(rows, 1);
    unit_heads = std::clamp<int64_t>(fitting, 1, group);
    group_units = (group + unit_heads - 1) / unit_heads;
    units = a.key.size[1] * group_units;
  }
};

int64_t list_keys(const AttentionScores& a, int64_t batch, int64_t length, int32_t* position,
                  bool* wanted) {
  const bool only_candidates = a.candidates_only || a.lse;
  int64_t size = 0;
  for (int64_t s = 0; s < length; ++s) {
    const bool candidate = *a.candidates.at(batch, s);
    position[size] = static_cast<int32_t>(s);
    wanted[size] = candidate;
    size += (!a.valid || *a.valid.at(batch, s)) && (candidate || !only_candidates);
  }
  return size;
}

template <class T>
struct Unit {
  const AttentionScores& a;
  const Plan& plan;
  Keys keys;
  int64_t batch, kv_head;
  Wide<T> row_weight;
  Wide<T>* column;  // [keys.size]
};

// One (head, query row) pair.
struct Row {
  int64_t head, index;
};

// The last key a row attends to, -1 for none.
template <class T>
int64_t last_key(const Unit<T>& u, const Row& row) {
  const int64_t end = u.plan.length - 1;
  if (u.a.lse && *view_as<const Wide<T>>(u.a.lse).at(u.batch, row.head, row.index) == -INFINITY)
    return -1;
  if (!u.a.query_positions) return end;
  return std::clamp<int64_t>(*u.a.query_positions.at(u.batch, row.index), -1, end);
}

// Log-sum-exp in base 2, as the logits are.
template <class T>
Wide<T> given_lse(const Unit<T>& u, const Row& row) {
  using A = Wide<T>;
  return *view_as<const A>(u.a.lse).at(u.batch, row.head, row.index) * static_cast<A>(kLog2e);
}

// How many of the listed keys come no later than `last`.
int64_t keys_until(const Keys& keys, int64_t last) {
  return std::upper_bound(keys.position, keys.position + keys.size, static_cast<int32_t>(last)) -
         keys.position;
}

template <class T>
void add_few(const Unit<T>& u, const Row* rows, int64_t row_count) {
  using A = Wide<T>;
  const auto query = view_as<const T>(u.a.query);
  const auto key = view_as<const T>(u.a.key);
  const int64_t dim = u.plan.dim, stride = u.keys.size;
  const Scratch<A> queries(row_count * dim), logits(row_count * stride);
  int64_t farthest = -1;
  for (int64_t r = 0; r < row_count; ++r) {
    widen_row(query.at(u.batch, rows[r].head, rows[r].index), dim, queries + r * dim);
    for (int64_t d = 0; d < dim; ++d) queries[r * dim + d] *= static_cast<A>(u.a.scale * kLog2e);
    farthest = std::max(farthest, last_key(u, rows[r]));
  }
  dot_rows<T>(key.at(u.batch, u.kv_head), key.stride[2], u.keys.position,
              keys_until(u.keys, farthest), queries, row_count, dim, logits, stride);
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t count = keys_until(u.keys, last_key(u, rows[r]));
    if (count == 0) continue;
    A* weights = logits + r * stride;
    A share = u.row_weight;
    if (u.a.lse) {
      exponentials(weights, count, given_lse(u, rows[r]));
    } else {
      const A top = largest(weights, count);
      const A sum = exponentials(weights, count, top == -INFINITY ? A{0} : top);
      share = sum == 0 ? NAN
                       : u.row_weight / sum;  // 0: all logits are -inf, of which softmax makes NaN
    }
    for (int64_t j = 0; j < count; ++j) u.column[j] += weights[j] * share;
  }
}

// Exponentials need no statistics of ours: weight = exp(logit - lse).
template <class T, int V>
void add_with_lse(const Unit<T>& u, const Panel<T, V>& panel, const Wide<T>* lse,
                  int64_t key_count) {
  using A = Wide<T>;
  const auto key = view_as<const T>(u.a.key);
  const Scratch<A> block(kBlock * panel.kWidth);
  for (int64_t begin = 0; begin < key_count; begin += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, key_count - begin);
    const int32_t* position = u.keys.position + begin;
    panel.logits(key, u.batch, u.kv_head, position, count, block);
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> weight = {};
      for (int v = 0; v < V; ++v) {
        const Vec<A> logit = load(block + (j * V + v) * kLanes<A>),
                     base = load(lse + v * kLanes<A>);
        weight = weight + (panel.bounds(v) >= position[j] ? exp2_of(logit - base) : Vec<A>{});
      }
      u.column[begin + j] += sum_lanes(weight) * u.row_weight;
    }
  }
}

template <class T, int V>
void add_with_softmax(const Unit<T>& u, const Panel<T, V>& panel, int64_t key_count) {
  using A = Wide<T>;
  constexpr int kWidth = Panel<T, V>::kWidth;
  const auto key = view_as<const T>(u.a.key);
  const int64_t blocks = (key_count + kBlock - 1) / kBlock;
  const Scratch<A> weights(key_count * kWidth), block_maximum(blocks * kWidth);
  const auto block_size = [&](int64_t b) {
    return std::min<int64_t>(kBlock, key_count - b * kBlock);
  };

  LaneSoftmax<A> softmax[V];
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* position = u.keys.position + b * kBlock;
    A* block = weights + b * kBlock * kWidth;
    panel.logits(key, u.batch, u.kv_head, position, block_size(b), block);
    for (int v = 0; v < V; ++v) {
      const int64_t at = v * kLanes<A>;
      const auto step =
          softmax[v].add(block + at, kWidth, position, block_size(b), panel.bounds(v));
      store(block_maximum + b * kWidth + at, step.top);
    }
  }

  Vec<A> base[V], share[V];
  for (int v = 0; v < V; ++v) {
    base[v] = softmax[v].base(softmax[v].maximum);
    share[v] =
        softmax_share<A>(u.row_weight, softmax[v].sum, panel.bounds(v) >= u.keys.position[0]);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    Vec<A> factor[V];
    for (int v = 0; v < V; ++v) {
      factor[v] = exp2_of(load(block_maximum + b * kWidth + v * kLanes<A>) - base[v]) * share[v];
    }
    for (int64_t i = b * kBlock; i < b * kBlock + block_size(b); ++i) {
      if (!u.keys.wanted[i]) continue;
      Vec<A> weight = {};
      for (int v = 0; v < V; ++v) {
        const Vec<A> scaled = load(weights + i * kWidth + v * kLanes<A>) * factor[v];
        weight = weight + (panel.bounds(v) >= u.keys.position[i] ? scaled : Vec<A>{});
      }
      u.column[i] += sum_lanes(weight);
    }
  }
}

template <class T, int V>
void add_panel(const Unit<T>& u, const Row* rows, int64_t row_count) {
  using A = Wide<T>;
  const auto query = view_as<const T>(u.a.query);
  Panel<T, V> panel(u.plan.dim, u.a.scale);
  alignas(64) A lse[panel.kWidth] = {};
  int64_t farthest = -1;
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t last = last_key(u, rows[r]);
    panel.add_row(query.at(u.batch, rows[r].head, rows[r].index), last);
    if (u.a.lse) lse[r] = given_lse(u, rows[r]);
    farthest = std::max(farthest, last);
  }
  const int64_t key_count = keys_until(u.keys, farthest);
  if (key_count == 0) return;
  if (u.a.lse) {
    add_with_lse(u, panel, lse, key_count);
  } else {
    add_with_softmax(u, panel, key_count);
  }
}

template <class T>
void run_unit(const Unit<T>& u, const Row* rows, int64_t row_count) {
  constexpr int64_t kStep = kLanes<Wide<T>>;
  std::fill(u.column, u.column + u.keys.size, Wide<T>{0});
  if (row_count <= kFewRows) return add_few(u, rows, row_count);
  for (int64_t r = 0; r < row_count;) {
    const int64_t left = row_count - r;
    if (left <= kStep) {
      add_panel<T, 1>(u, rows + r, left);
      r += kStep;
    } else if (left <= 2 * kStep || kPanelVectors == 2) {
      add_panel<T, 2>(u, rows + r, std::min(left, 2 * kStep));
      r += 2 * kStep;
    } else {
      add_panel<T, kPanelVectors>(u, rows + r, std::min(left, kPanelVectors * kStep));
      r += kPanelVectors * kStep;
    }
  }
}

template <class T>
void scores_of(const AttentionScores& a) {
  using A = Wide<T>;
  const Plan plan(a);
  const Scratch<int32_t> positions(plan.batch * plan.length);
  const Scratch<bool> wanted(plan.batch * plan.length);
  const Scratch<int64_t> sizes(plan.batch), rows_valid(plan.batch);
  const auto keys_of = [&](int64_t b) {
    return Keys{positions + b * plan.length, wanted + b * plan.length, sizes[b]};
  };
  const auto row_valid = [&](int64_t b, int64_t m) {
    return !a.query_valid || *a.query_valid.at(b, m);
  };
  parallel(plan.batch, 2 * plan.length + plan.rows, [&](int64_t b) {
    sizes[b] = list_keys(a, b, plan.length, positions + b * plan.length, wanted + b * plan.length);
    rows_valid[b] = 0;
    for (int64_t m = 0; m < plan.rows; ++m) rows_valid[b] += row_valid(b, m);
  });

  const Scratch<A> columns(plan.batch * plan.units * plan.length);
  const int64_t unit_cost = plan.length * plan.dim * (1 + plan.unit_heads * plan.rows / 8) / 8;
  parallel(plan.batch * plan.units, unit_cost, [&](int64_t unit) {
    const int64_t b = unit / plan.units, part = unit % plan.units;
    const int64_t kv_head = part / plan.group_units;
    const int64_t first = part % plan.group_units * plan.unit_heads;
    const int64_t last = std::min(first + plan.unit_heads, plan.group);
    const Scratch<Row> rows((last - first) * plan.rows);
    int64_t row_count = 0;
    for (int64_t h = first; h < last; ++h) {
      for (int64_t m = 0; m < plan.rows; ++m) {
        if (row_valid(b, m)) rows[row_count++] = {kv_head * plan.group + h, m};
      }
    }
    const A weight = A{1} / static_cast<A>(std::max<int64_t>(rows_valid[b], 1));
    run_unit<T>({a, plan, keys_of(b), b, kv_head, weight, columns + unit * plan.length}, rows,
                row_count);
  });

  parallel(plan.batch, plan.length * plan.units / 4, [&](int64_t b) {
    A* scores = static_cast<A*>(a.scores) + b * plan.length;
    std::fill(scores, scores + plan.length, A{0});
    const Keys keys = keys_of(b);
    const A* column = columns + b * plan.units * plan.length;
    const Scratch<A> total(plan.length);
    std::copy(column, column + keys.size, &total[0]);
    for (int64_t unit = 1; unit < plan.units; ++unit) {
      column += plan.length;
      if (a.head_reduce == HeadReduce::max) {
        for (int64_t i = 0; i < keys.size; ++i) {  // NaN wins
          total[i] = column[i] > total[i] || column[i] != column[i] ? column[i] : total[i];
        }
      } else {
        for (int64_t i = 0; i < keys.size; ++i) total[i] += column[i];
      }
    }
    const A share = a.head_reduce == HeadReduce::mean ? A{1} / static_cast<A>(plan.heads) : A{1};
    for (int64_t i = 0; i < keys.size; ++i) {
      if (keys.wanted[i]) scores[keys.position[i]] = total[i] * share;
    }
  });
}

}  // namespace

void attention_scores(const AttentionScores& a) {
  with_type(a.query.dtype, [&](auto type) { scores_of<decltype(type)>(a); });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
