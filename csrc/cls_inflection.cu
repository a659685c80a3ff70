// The cosine of every token and CLS, whose knee inflection.cu finds. A warp reads a token once and
// takes its product with CLS and its norm; the norm of CLS comes along, its elements are at hand.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/joined_ops.cuh"
#include "vtp/row_dot.cuh"
#include "vtp/vector.cuh"
#include "vtp/warp.cuh"

namespace vtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Few tokens need a warp each to fill a device. Of many, a warp takes four at once: CLS is read
// once for all. Both sum in the same order.
constexpr int kFewTokens = 1, kManyTokens = 4;
constexpr int64_t kMany = 16384;  // tokens; what 132 multiprocessors hold at a token a warp

// Blocks a multiprocessor is to hold. Left to itself the compiler aims for more and, short of
// registers, splits what is to be under way at once in two.
template <int Tokens>
constexpr int kBlocks = Tokens == 1 ? 4 : 3;

// A unit of a row as in memory: sixteen bytes, or an element where rows are not aligned.
template <class T, bool Aligned>
struct Unit {
  static constexpr int kSize = Aligned ? kVectorSize<T> : 1;
  std::conditional_t<Aligned, uint4, T> bits;

  VTP_DEVICE void load(const T* row, int64_t unit, int64_t units) {
    if constexpr (Aligned) {
      bits = uint4{0, 0, 0, 0};
    } else {
      bits = from_float<T>(0.0f);
    }
    if (unit < units) bits = reinterpret_cast<const decltype(bits)*>(row)[unit];
  }

  VTP_DEVICE void widen(float (&out)[kSize]) const {
    if constexpr (Aligned) {
      widen_vector<T>(bits, out);
    } else {
      out[0] = to_float(bits);
    }
  }
};

template <int Size>
VTP_DEVICE float dot(const float (&a)[Size], const float (&b)[Size], float sum) {
#pragma unroll
  for (int i = 0; i < Size; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

template <class T, bool Aligned, int Tokens>
__global__ void __launch_bounds__(kThreads, kBlocks<Tokens>)
    similarities(CosineSimilarity a, unsigned parts, bool is_last) {
  constexpr int kAtOnce = Tokens == 1 ? 4 : 2;  // units of a row under way
  const auto features = view_as<const T>(a.features);
  const int64_t b = blockIdx.x / parts, length = features.size[1];
  const int64_t first = (static_cast<int64_t>(blockIdx.x % parts) * kWarps + warp_id()) * Tokens;
  if (!is_last) release_next_kernel();
  if (first >= length) return;

  const T* cls = view_as<const T>(a.cls).at(b);
  const T* row[Tokens];  // past the end: the last token again, not stored
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    row[t] = features.at(b, first + t < length ? first + t : length - 1);
  }
  float products[Tokens] = {}, squares[Tokens] = {}, cls_square = 0.0f;
  const int64_t units = features.size[2] / Unit<T, Aligned>::kSize;
  for (int64_t base = 0; base < units; base += kAtOnce * kWarp) {
    Unit<T, Aligned> x[kAtOnce][Tokens], c[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int t = 0; t < Tokens; ++t) x[i][t].load(row[t], base + i * kWarp + lane_id(), units);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) c[i].load(cls, base + i * kWarp + lane_id(), units);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float token[Unit<T, Aligned>::kSize], own[Unit<T, Aligned>::kSize];
      c[i].widen(own);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
        x[i][t].widen(token);
        products[t] = dot(token, own, products[t]);
        squares[t] = dot(token, token, squares[t]);
      }
      cls_square = dot(own, own, cls_square);
    }
  }

  // Lane t finishes token t.
  float product = 0.0f, square = 0.0f;
#pragma unroll
  for (int t = 0; t < Tokens; ++t) {
    const float product_sum = warp_sum(products[t]), square_sum = warp_sum(squares[t]);
    product = lane_id() == t ? product_sum : product;
    square = lane_id() == t ? square_sum : square;
  }
  const float norms = sqrtf(square) * sqrtf(warp_sum(cls_square));
  if (lane_id() < Tokens && first + lane_id() < length) {
    static_cast<float*>(a.similarity)[b * length + first + lane_id()] =
        norms == 0.0f ? 0.0f : product / norms;
  }
}

}  // namespace

size_t cosine_similarity_workspace(const CosineSimilarity&) { return 0; }

void cosine_similarity(const CosineSimilarity& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  cosine_similarity(a, workspace, ours, true);
}

void cosine_similarity(const CosineSimilarity& a, void*, OpStream& stream, bool is_last) {
  const int64_t batch = a.features.size[0], length = a.features.size[1];
  const auto run = [&](const char* name, auto kernel, int tokens) {
    const int64_t parts = divide_up(length, kWarps * tokens);
    launch(name, kernel, dim3(batch * parts), kThreads, 0, stream, a, parts, is_last);
  };
  with_type(a.features.dtype, [&](auto type) {
    using T = decltype(type);
    if (!rows_are_aligned(a.features) || !rows_are_aligned(a.cls)) {
      run("cosine_similarity: any alignment", similarities<T, false, kFewTokens>, kFewTokens);
    } else if (batch * length < kMany) {
      run("cosine_similarity", similarities<T, true, kFewTokens>, kFewTokens);
    } else {
      run("cosine_similarity: many tokens", similarities<T, true, kManyTokens>, kManyTokens);
    }
  });
}

size_t cls_inflection_workspace(const ClsInflection& a) {
  return std::max(cosine_similarity_workspace(a.similarity), inflection_workspace(a.inflection));
}

void cls_inflection(const ClsInflection& a, void* workspace, Stream stream) {
  OpStream ours(stream);
  cosine_similarity(a.similarity, workspace, ours, false);
  inflection(a.inflection, workspace, ours);
}

}  // namespace vtp::cuda
