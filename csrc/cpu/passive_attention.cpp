// Causal attention with visual tokens as passive sinks, without the work on what has no weight. The
// rows of a panel are of one kind, text or visual, and have two lists of keys: `weighted` ones,
// which reach the output, and `silent` ones, which only stand in the softmax denominator: for those
// no value is read and no product taken. Both lists run through an online softmax of their own and
// meet at the end.
#include <algorithm>

#include "panel.h"
#include "parallel.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

struct Positions {
  const int32_t* data = nullptr;
  int64_t size = 0;

  // How many are at or before `last`.
  int64_t until(int32_t last) const { return std::upper_bound(data, data + size, last) - data; }
};

// The tokens of one batch row by kind, each list ascending.
struct Tokens {
  Positions text, visual, all, text_and_first;  // valid ones; "first" is the first visual token
};

struct Panels {
  Positions rows, weighted, silent;
  bool merge;  // the silent mass goes to the first visual key
};

Panels text_panels(const PassiveAttention& a, const Tokens& t) {
  if (!a.renormalize) return {t.text, t.text, t.visual, a.merge};
  return {t.text, a.merge ? t.text_and_first : t.text, {}, false};
}

Panels visual_panels(const PassiveAttention& a, const Tokens& t) {
  switch (a.visual_rows) {
    case VisualRows::causal:
      return {t.visual, t.all, {}, false};
    case VisualRows::prefix:
      return {t.visual, t.text, a.renormalize ? Positions{} : t.visual, false};
    case VisualRows::skip:
      break;
  }
  return {};
}

template <class T>
constexpr int64_t kRows = kPanelLanes<Wide<T>>;

// One panel: up to kRows rows of one head.
template <class T>
class Attend {
 public:
  using A = Wide<T>;
  static constexpr int V = kPanelVectors, kWidth = V * kLanes<A>;

  Attend(const PassiveAttention& a, int64_t batch, int64_t head)
      : a_(a),
        query_(view_as<const T>(a.query)),
        key_(view_as<const T>(a.key)),
        value_(view_as<const T>(a.value)),
        batch_(batch),
        head_(head),
        kv_head_(head / (query_.size[1] / key_.size[1])),
        dim_(query_.size[3]) {}

  void run(const Panels& p, int64_t first_row, int32_t first_visual) const {
    Panel<T, V> panel(dim_, a_.scale);
    const int64_t row_count = std::min(kRows<T>, p.rows.size - first_row);
    const int32_t* rows = p.rows.data + first_row;
    for (int64_t r = 0; r < row_count; ++r)
      panel.add_row(query_.at(batch_, head_, rows[r]), rows[r]);

    const Scratch<A> sums(dim_ * kWidth);  // of weight * value, transposed: [D, kWidth]
    std::memset(sums, 0, sizeof(A) * dim_ * kWidth);
    LaneSoftmax<A> weighted[V], silent[V];
    const int32_t last = rows[row_count - 1];
    sweep(panel, {p.silent.data, p.silent.until(last)}, silent, nullptr);
    sweep(panel, {p.weighted.data, p.weighted.until(last)}, weighted, sums);

    const Scratch<A> first_value(dim_);
    if (p.merge && p.silent.size > 0) {
      widen_row(value_.at(batch_, kv_head_, first_visual), dim_, first_value);
    }
    for (int v = 0; v < V; ++v) {
      const Vec<A> base = LaneSoftmax<A>::base(larger<A>(weighted[v].maximum, silent[v].maximum));
      const Vec<A> gain = exp2_of(weighted[v].maximum - base);
      const Vec<A> silent_mass = silent[v].sum * exp2_of(silent[v].maximum - base);
      const Ints<A> bound = panel.bounds(v);
      const Ints<A> attends = (p.weighted.size > 0 ? bound >= p.weighted.data[0] : Ints<A>{}) |
                              (p.silent.size > 0 ? bound >= p.silent.data[0] : Ints<A>{});
      const Vec<A> share = softmax_share<A>(1, weighted[v].sum * gain + silent_mass, attends);
      const Vec<A> own = gain * share, moved = silent_mass * share;
      for (int64_t d = 0; d < dim_; ++d) {
        A* at = sums + d * kWidth + v * kLanes<A>;
        const Vec<A> result = load(at) * own;
        store(at, p.merge && p.silent.size > 0 ? result + moved * first_value[d] : result);
      }
    }
    for (int64_t r = 0; r < row_count; ++r) {
      T* out = output_row(rows[r]);
      for (int64_t d = 0; d < dim_; ++d) narrow(sums[d * kWidth + r], out[d]);
    }
  }

  void clear_row(int64_t row) const { std::memset(output_row(row), 0, dim_ * sizeof(T)); }

 private:
  // Runs the keys through `softmax`; with `sums` given, also adds up weight * value.
  void sweep(const Panel<T, V>& panel, Positions keys, LaneSoftmax<A>* softmax, A* sums) const {
    const Scratch<A> block(kBlock * kWidth), values(kBlock * dim_);
    for (int64_t begin = 0; begin < keys.size; begin += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, keys.size - begin);
      const int32_t* position = keys.data + begin;
      panel.logits(key_, batch_, kv_head_, position, count, block);
      for (int v = 0; v < V; ++v) {
        A* lanes = block + v * kLanes<A>;
        const auto step = softmax[v].add(lanes, kWidth, position, count, panel.bounds(v));
        if (sums == nullptr) continue;
        for (int64_t j = 0; j < count; ++j)
          store(lanes + j * kWidth, load(lanes + j * kWidth) * step.gain);
        A* own = sums + v * kLanes<A>;
        for (int64_t d = 0; d < dim_; ++d)
          store(own + d * kWidth, load(own + d * kWidth) * step.keep);
      }
      if (sums == nullptr) continue;
      for (int64_t j = 0; j < count; ++j) {
        widen_row(value_.at(batch_, kv_head_, position[j]), dim_, values + j * dim_);
      }
      product<A, V>(block, values, 1, dim_, count, dim_, sums, true);
    }
  }

  T* output_row(int64_t row) const {
    const int64_t heads = query_.size[1], length = query_.size[2];
    return static_cast<T*>(a_.output) + ((batch_ * heads + head_) * length + row) * dim_;
  }

  const PassiveAttention& a_;
  const View<const T, 4> query_, key_, value_;
  const int64_t batch_, head_, kv_head_, dim_;
};

// Fills four lists of up to `length` positions from `memory`.
Tokens list_tokens(const PassiveAttention& a, int64_t batch, int64_t length, int32_t* memory) {
  int32_t* list[4] = {memory, memory + length, memory + 2 * length, memory + 3 * length};
  int64_t size[4] = {};
  const auto add = [&](int kind, int64_t s) { list[kind][size[kind]++] = static_cast<int32_t>(s); };
  for (int64_t s = 0; s < length; ++s) {
    if (a.valid && !*a.valid.at(batch, s)) continue;
    const bool visual = *a.visual.at(batch, s);
    if (!visual || size[1] == 0) add(3, s);
    add(visual ? 1 : 0, s);
    add(2, s);
  }
  return {{list[0], size[0]}, {list[1], size[1]}, {list[2], size[2]}, {list[3], size[3]}};
}

template <class T>
void attend_all(const PassiveAttention& a) {
  const int64_t batch = a.query.size[0], heads = a.query.size[1], length = a.query.size[2];
  const int64_t panels =
      length / kRows<T> + 2;  // at most: text and visual rows each end in a partial one
  const Scratch<int32_t> memory(batch * 4 * length);
  const auto tokens_of = [&](int64_t b) {
    return list_tokens(a, b, length, memory + b * 4 * length);
  };
  const Scratch<Tokens> tokens(batch);
  for (int64_t b = 0; b < batch; ++b) tokens[b] = tokens_of(b);

  // Consecutive units are panels of one head: a thread's share holds early, cheap and late, dear
  // ones.
  const int64_t cost = length * a.query.size[3] * kRows<T> / 16;
  parallel(batch * heads * panels, cost, [&](int64_t unit) {
    const int64_t b = unit / (heads * panels), head = unit / panels % heads, panel = unit % panels;
    const Attend<T> attend(a, b, head);
    const Tokens& t = tokens[b];
    const Panels text = text_panels(a, t), visual = visual_panels(a, t);
    const int64_t text_count = (text.rows.size + kRows<T> - 1) / kRows<T>;
    const int64_t visual_count = (visual.rows.size + kRows<T> - 1) / kRows<T>;
    const int32_t first_visual = t.visual.size > 0 ? t.visual.data[0] : 0;
    if (panel < text_count) {
      attend.run(text, panel * kRows<T>, first_visual);
    } else if (panel < text_count + visual_count) {
      attend.run(visual, (panel - text_count) * kRows<T>, first_visual);
    }
    if (panel > 0) return;
    for (int64_t s = 0; s < length; ++s) {
      const bool skipped = a.visual_rows == VisualRows::skip && *a.visual.at(b, s);
      if (skipped || (a.valid && !*a.valid.at(b, s))) attend.clear_row(s);
    }
  });
}

}  // namespace

void passive_attention(const PassiveAttention& a) {
  with_type(a.query.dtype, [&](auto type) { attend_all<decltype(type)>(a); });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
