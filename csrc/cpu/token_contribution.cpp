// What each token adds to the attention output of one row, in closed form: with o the output and
// c_j = concat_h a[h,j] v[h,j],
//   alpha_j = <o, c_j> = sum_h a[h,j] <o_h, v[h,j]>,   beta_j = ||c_j||^2 = sum_h a[h,j]^2
//   ||v[h,j]||^2, cos(o - c_j, o) = (||o||^2 - alpha_j) / (||o|| sqrt(||o||^2 - 2 alpha_j +
//   beta_j)).
// K is read once, V twice, and nothing of size [S, H, D] is made. Heads are summed in double: the
// cosines of interest lie within 1e-3 of 1.
#include <algorithm>

#include "parallel.h"
#include "rows.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

constexpr int64_t kTile = 32;  // rows of K or V that stay in L1 while all heads of a group use them

// out += sum_j weight[j] * row j: as many sums as fit the registers, then on to the next columns.
template <class T>
void weighted_rows(const T* rows, int64_t stride, const int32_t* position, int64_t size,
                   const Wide<T>* weight, int64_t dim, Wide<T>* out) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>, kSums = 4;
  int64_t d = 0;
  for (; d + kSums * kStep <= dim; d += kSums * kStep) {
    Vec<A> sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = load(out + d + i * kStep);
    for (int64_t j = 0; j < size; ++j) {
      const T* row = rows + position[j] * stride + d;
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] + load(row + i * kStep) * weight[j];
    }
    for (int i = 0; i < kSums; ++i) store(out + d + i * kStep, sums[i]);
  }
  for (; d + kStep <= dim; d += kStep) {
    Vec<A> sum = load(out + d);
    for (int64_t j = 0; j < size; ++j)
      sum = sum + load(rows + position[j] * stride + d) * weight[j];
    store(out + d, sum);
  }
  for (; d < dim; ++d) {
    for (int64_t j = 0; j < size; ++j) out[d] += widen(rows[position[j] * stride + d]) * weight[j];
  }
}

// The keys of one batch row that are attended to, ascending, and which of them are candidates.
struct Keys {
  const int32_t* position;
  const bool* wanted;
  int64_t size;
};

template <class T>
class Contributions {
 public:
  using A = Wide<T>;

  explicit Contributions(const TokenContribution& a)
      : a_(a),
        key_(view_as<const T>(a.key)),
        value_(view_as<const T>(a.value)),
        batch_(a.query.size[0]),
        heads_(a.query.size[1]),
        dim_(a.query.size[2]),
        kv_heads_(a.key.size[1]),
        length_(a.key.size[2]),
        group_(heads_ / kv_heads_),
        positions_(batch_ * length_),
        wanted_(batch_ * length_),
        sizes_(batch_),
        weights_(batch_ * heads_ * length_),
        output_(batch_ * heads_ * dim_),
        alpha_(batch_ * kv_heads_ * length_),
        beta_(batch_ * kv_heads_ * length_),
        output_squared_(batch_ * kv_heads_) {}

  void run() const {
    for (int64_t b = 0; b < batch_; ++b) list_keys(b);
    parallel(batch_ * kv_heads_, length_ * dim_ * (1 + group_) / 4,
             [&](int64_t unit) { attend(unit / kv_heads_, unit % kv_heads_); });
    parallel(batch_, length_ * (8 + kv_heads_), [&](int64_t b) { combine(b); });
  }

 private:
  void list_keys(int64_t b) const {
    int32_t* position = positions_ + b * length_;
    bool* wanted = wanted_ + b * length_;
    int64_t size = 0;
    for (int64_t s = 0; s < length_; ++s) {
      position[size] = static_cast<int32_t>(s);
      wanted[size] = *a_.candidates.at(b, s);
      size += !a_.valid || *a_.valid.at(b, s);
    }
    sizes_[b] = size;
  }

  Keys keys_of(int64_t b) const {
    return {positions_ + b * length_, wanted_ + b * length_, sizes_[b]};
  }
  A* weights_of(int64_t b, int64_t head) const { return weights_ + (b * heads_ + head) * length_; }
  A* output_of(int64_t b, int64_t head) const { return output_ + (b * heads_ + head) * dim_; }

  // Softmax weights, output and the sums over this KV head's group.
  void attend(int64_t b, int64_t kv_head) const {
    const auto [position, wanted, size] = keys_of(b);
    const T *keys = key_.at(b, kv_head), *values = value_.at(b, kv_head);
    const int64_t first = kv_head * group_, unit = b * kv_heads_ + kv_head;

    const Scratch<A> queries(group_ * dim_);
    const A factor = static_cast<A>(a_.scale * kLog2e);
    for (int64_t g = 0; g < group_; ++g) {
      widen_row(view_as<const T>(a_.query).at(b, first + g), dim_, queries + g * dim_);
      for (int64_t d = 0; d < dim_; ++d) queries[g * dim_ + d] *= factor;
    }
    dot_rows<T>(keys, key_.stride[2], position, size, queries, group_, dim_, weights_of(b, first),
                length_);

    A* output = output_of(b, first);
    std::fill(output, output + group_ * dim_, A{0});
    for (int64_t g = 0; g < group_; ++g) {
      A* weights = weights_of(b, first + g);
      const A sum = exponentials(weights, size, largest(weights, size));
      for (int64_t j = 0; j < size; ++j) weights[j] /= sum;
    }
    for (int64_t begin = 0; begin < size; begin += kTile) {
      for (int64_t g = 0; g < group_; ++g) {
        weighted_rows<T>(values, value_.stride[2], position + begin, std::min(kTile, size - begin),
                         weights_of(b, first + g) + begin, dim_, output + g * dim_);
      }
    }

    output_squared_[unit] = 0.0;
    for (int64_t g = 0; g < group_; ++g)
      output_squared_[unit] += dot(output + g * dim_, output + g * dim_);
    const Scratch<A> row(dim_);
    for (int64_t j = 0; j < size; ++j) {
      if (!wanted[j]) continue;
      widen_row(values + position[j] * value_.stride[2], dim_, row);
      const double value_squared = dot(row, row);
      double alpha = 0.0, beta = 0.0;
      for (int64_t g = 0; g < group_; ++g) {
        const double weight = weights_of(b, first + g)[j];
        alpha += weight * dot(row, output + g * dim_);
        beta += weight * weight * value_squared;
      }
      alpha_[unit * length_ + j] = alpha;
      beta_[unit * length_ + j] = beta;
    }
  }

  // All KV heads together: cosine and norm.
  void combine(int64_t b) const {
    A* cosine = static_cast<A*>(a_.cosine) + b * length_;
    A* norm = static_cast<A*>(a_.norm) + b * length_;
    std::fill(cosine, cosine + length_, A{1});
    std::fill(norm, norm + length_, A{0});
    const auto [position, wanted, size] = keys_of(b);
    double squared = 0.0;
    for (int64_t h = 0; h < kv_heads_; ++h) squared += output_squared_[b * kv_heads_ + h];
    for (int64_t j = 0; j < size; ++j) {
      if (!wanted[j]) continue;
      double alpha = 0.0, beta = 0.0;
      for (int64_t h = 0; h < kv_heads_; ++h) {
        alpha += alpha_[(b * kv_heads_ + h) * length_ + j];
        beta += beta_[(b * kv_heads_ + h) * length_ + j];
      }
      if (beta == 0.0) continue;  // no contribution: cosine 1
      norm[position[j]] = static_cast<A>(std::sqrt(beta));
      // The closed form subtracts numbers as large as ||o||^2: where less than 0.1 % of that is
      // left, a token that is nearly all of the output, the rest is added up instead.
      double rest_squared = squared - 2.0 * alpha + beta, rest_dot_output = squared - alpha;
      if (rest_squared < 1e-3 * squared) add_rest(b, j, &rest_squared, &rest_dot_output);
      const double scale = std::sqrt(rest_squared) * std::sqrt(squared);
      cosine[position[j]] = scale == 0.0 ? A{0} : static_cast<A>(rest_dot_output / scale);
    }
  }

  // ||o - c_j||^2 and <o - c_j, o> from the other tokens' contributions.
  void add_rest(int64_t b, int64_t j, double* rest_squared, double* rest_dot_output) const {
    const auto [position, wanted, size] = keys_of(b);
    const Scratch<A> rest(dim_);
    *rest_squared = *rest_dot_output = 0.0;
    for (int64_t head = 0; head < heads_; ++head) {
      const T* values = value_.at(b, head / group_);
      const A* weights = weights_of(b, head);
      std::fill(&rest[0], &rest[dim_], A{0});
      weighted_rows<T>(values, value_.stride[2], position, j, weights, dim_, rest);
      weighted_rows<T>(values, value_.stride[2], position + j + 1, size - j - 1, weights + j + 1,
                       dim_, rest);
      *rest_squared += dot(rest, rest);
      *rest_dot_output += dot(rest, output_of(b, head));
    }
  }

  double dot(const A* x, const A* y) const {
    A result;
    dot_tile<A, 1, 1>(&x, y, dim_, &result, 1);
    return result;
  }

  const TokenContribution& a_;
  const View<const T, 4> key_, value_;
  const int64_t batch_, heads_, dim_, kv_heads_, length_, group_;
  const Scratch<int32_t> positions_;                     // [B, S]
  const Scratch<bool> wanted_;                           // [B, S]
  const Scratch<int64_t> sizes_;                         // [B]
  const Scratch<A> weights_;                             // [B, Hq, S]
  const Scratch<A> output_;                              // [B, Hq, D]
  const Scratch<double> alpha_, beta_, output_squared_;  // [B, Hkv, S], [B, Hkv]
};

}  // namespace

void token_contribution(const TokenContribution& a) {
  with_type(a.query.dtype, [&](auto type) { Contributions<decltype(type)>(a).run(); });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
