// Cosines of rows of features: the product of two rows over the root of the product of their squares.
//
// A square is added up like the product of two rows, so that equal rows have cosine 1, exactly: the
// root of s * s is s. And it tells what a row is:
//   NaN       it has no part: not finite, or neither a candidate nor kept
//   sign bit  it is kept, not a candidate
//   0         all zeros: of cosine 0 with every row
//   infinity  finite, but of products that float32 may not hold. Such a row's cosines are taken of
//             rows scaled by a power of two, each by a whole warp: slow, but nothing is lost.
// float16 has no such rows; what towers and language models give has none either.
#pragma once

#include <cmath>

#include "vector.cuh"
#include "warp.cuh"

namespace vtp::cuda {

// Within these the product of two squares is a normal number.
constexpr float kLeastSquare = 0x1p-60f, kMostSquare = 0x1p60f;

// The rows of one batch entry.
template <class T>
struct FeatureRows {
  static constexpr int kPart = kVectorSize<T>;  // elements of a lane at a time

  const T* data;
  int64_t stride;
  int count, channels;
  bool aligned;  // every row to 16 bytes

  VTP_DEVICE static FeatureRows of(const SelectDiverse& a, int64_t batch, bool aligned) {
    const auto features = view_as<const T>(a.features);
    return {features.at(batch), features.stride[1], static_cast<int>(features.size[1]),
            static_cast<int>(features.size[2]), aligned};
  }

  VTP_DEVICE void load(int row, int channel, float (&out)[kPart]) const {
    const T* at = data + row * stride + channel;
    if (aligned) {
      load_vector(at, out);
    } else {
      load_elements(at, channels - channel, out);
    }
  }

  // The first channel of a lane, and how far the next is.
  VTP_DEVICE static int first_part() { return lane_id() * kPart; }
  static constexpr int kStep = kWarp * kPart;
};

// By a whole warp, as the three functions below: products of row `one` with others, all added up in
// the same order.
template <int Count, class T>
VTP_DEVICE void row_products(const FeatureRows<T>& rows, int one, const int (&others)[Count],
                             float (&products)[Count]) {
#pragma unroll
  for (int r = 0; r < Count; ++r) products[r] = 0.0f;
  for (int c = rows.first_part(); c < rows.channels; c += rows.kStep) {
    float x[rows.kPart];
    rows.load(one, c, x);
#pragma unroll
    for (int r = 0; r < Count; ++r) {
      float y[rows.kPart];
      rows.load(others[r], c, y);
#pragma unroll
      for (int i = 0; i < rows.kPart; ++i) products[r] = fmaf(x[i], y[i], products[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < Count; ++r) products[r] = warp_sum(products[r]);
}

// The bits of the largest magnitude; those of NaN are the largest of all.
template <class T>
VTP_DEVICE uint32_t largest_bits(const FeatureRows<T>& rows, int row) {
  uint32_t largest = 0;
  for (int c = rows.first_part(); c < rows.channels; c += rows.kStep) {
    float x[rows.kPart];
    rows.load(row, c, x);
#pragma unroll
    for (int i = 0; i < rows.kPart; ++i) {
      const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
  }
  return warp_max(largest);
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

// What a row is, given its product with itself.
template <class T>
VTP_DEVICE float square_of(const FeatureRows<T>& rows, int row, float product) {
  if (product >= kLeastSquare && product <= kMostSquare) return product;
  const uint32_t largest = largest_bits(rows, row);
  return largest >= kInfinityBits ? NAN : largest == 0 ? 0.0f : INFINITY;
}

// The power of two that brings a row to about 1.
VTP_DEVICE float scale_of(uint32_t largest) {
  const int exponent = static_cast<int>(largest >> 23) - 126;  // at least -126, at most 128
  return __uint_as_float(static_cast<uint32_t>(127 - (exponent > 126 ? 126 : exponent)) << 23);
}

template <class T>
VTP_DEVICE float scaled_cosine(const FeatureRows<T>& rows, int first, int second) {
  const float scale[2] = {scale_of(largest_bits(rows, first)), scale_of(largest_bits(rows, second))};
  float product = 0.0f, square[2] = {};
  for (int c = rows.first_part(); c < rows.channels; c += rows.kStep) {
    float x[rows.kPart], y[rows.kPart];
    rows.load(first, c, x);
    rows.load(second, c, y);
#pragma unroll
    for (int i = 0; i < rows.kPart; ++i) {
      const float u = x[i] * scale[0], v = y[i] * scale[1];
      product = fmaf(u, v, product);
      square[0] = fmaf(u, u, square[0]);
      square[1] = fmaf(v, v, square[1]);
    }
  }
  const float root = sqrtf(warp_sum(square[0]) * warp_sum(square[1]));
  product = warp_sum(product);
  return root == 0.0f ? 0.0f : product / root;
}

VTP_DEVICE bool is_extreme(float square) { return fabsf(square) == INFINITY; }
VTP_DEVICE bool is_kept(float square) { return __float_as_uint(square) >> 31 != 0; }
VTP_DEVICE bool has_part(float square) { return square == square; }

// NaN where one of the rows has no part; of no use where one is extreme.
VTP_DEVICE float plain_cosine(float product, float first_square, float second_square) {
  const float root = sqrtf(fabsf(first_square) * fabsf(second_square));
  return root == 0.0f ? 0.0f : product / root;
}

// Whether a pair of rows takes scaled_cosine.
VTP_DEVICE bool is_lost(float first_square, float second_square) {
  return has_part(first_square) && has_part(second_square) &&
         (is_extreme(first_square) || is_extreme(second_square));
}

// By a whole warp: f(lane, cosine) for the lanes that have lost a pair, those of `row` and another.
template <class T, class F>
VTP_DEVICE void for_lost(const FeatureRows<T>& rows, int row, int other, bool lost, const F& f) {
  unsigned lanes = __ballot_sync(kAllLanes, lost);
#pragma unroll 1
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __ffs(static_cast<int>(lanes)) - 1;
    f(lane, scaled_cosine(rows, row, __shfl_sync(kAllLanes, other, lane)));
  }
}

}  // namespace vtp::cuda
