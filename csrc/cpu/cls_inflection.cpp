// The similarity of cls_inflection: cosine of every token and CLS, dot product and norm in one
// read. The knee is found by inflection.cpp.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace vtp::cpu {
namespace VTP_ISA {
namespace {

// <row, cls> and <row, row>
template <class T>
VTP_INLINE void dot_and_square(const T* row, const Wide<T>* cls, int64_t size, Wide<T>* dot,
                               Wide<T>* square) {
  using A = Wide<T>;
  constexpr int kStep = kLanes<A>;
  Vec<A> dots[2] = {}, squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= size; i += 2 * kStep) {
    for (int half = 0; half < 2; ++half) {
      const Vec<A> x = load(row + i + half * kStep);
      dots[half] = dots[half] + x * load(cls + i + half * kStep);
      squares[half] = squares[half] + x * x;
    }
  }
  *dot = sum_lanes(dots[0] + dots[1]);
  *square = sum_lanes(squares[0] + squares[1]);
  for (; i < size; ++i) {
    const A x = widen(row[i]);
    *dot += x * cls[i];
    *square += x * x;
  }
}

template <class T>
void similarities(const CosineSimilarity& a) {
  using A = Wide<T>;
  constexpr int64_t kTokens = 16;  // a unit of work
  const auto features = view_as<const T>(a.features);
  const int64_t batch = features.size[0], length = features.size[1], channels = features.size[2];
  const int64_t parts = (length + kTokens - 1) / kTokens;
  const Scratch<A> cls(batch * channels), cls_norm(batch);
  for (int64_t b = 0; b < batch; ++b) {
    A dot, square;
    widen_row(view_as<const T>(a.cls).at(b), channels, cls + b * channels);
    dot_and_square<A>(cls + b * channels, cls + b * channels, channels, &dot, &square);
    cls_norm[b] = std::sqrt(square);
  }
  parallel(batch * parts, kTokens * (10 + channels / 8), [&](int64_t unit) {
    const int64_t b = unit / parts, begin = unit % parts * kTokens;
    A* similarity = static_cast<A*>(a.similarity) + b * length;
    for (int64_t i = begin; i < std::min(begin + kTokens, length); ++i) {
      A dot, square;
      dot_and_square<T>(features.at(b, i), cls + b * channels, channels, &dot, &square);
      const A norms = std::sqrt(square) * cls_norm[b];
      similarity[i] = norms == 0 ? A{0} : dot / norms;
    }
  });
}

}  // namespace

void cosine_similarity(const CosineSimilarity& a) {
  with_type(a.features.dtype, [&](auto type) { similarities<decltype(type)>(a); });
}

}  // namespace VTP_ISA
}  // namespace vtp::cpu
