// The arguments of the ops as kernels see them: raw pointers, sizes and strides, no torch, the same
// for the CPU and for CUDA. They are taken as checked (csrc/torch_ops.h does that); contracts are
// those of the Python ops of the same names.
#pragma once

#include <cstdint>

// Small accessors are always inlined: a shared out-of-line copy, compiled for AVX-512 in one file
// and merged with its baseline twin by the linker, would bring AVX-512 code to CPUs without it.
#ifdef __CUDACC__
#define VTP_INLINE __host__ __device__ __forceinline__
#else
#define VTP_INLINE inline __attribute__((always_inline))
#endif

namespace vtp {

// A strided array of known element type.
template <class T, int Rank>
struct View {
  T* data = nullptr;
  int64_t size[Rank] = {};
  int64_t stride[Rank] = {};  // in elements

  VTP_INLINE explicit operator bool() const { return data != nullptr; }

  template <class... Index>
  VTP_INLINE T* at(Index... index) const {
    const int64_t position[] = {static_cast<int64_t>(index)...};
    T* p = data;
    for (unsigned i = 0; i < sizeof...(Index); ++i) p += position[i] * stride[i];
    return p;
  }
};

// A float tensor whose dtype is known at run time; the last stride is 1.
enum class DType : uint8_t { f32, f64, f16, bf16 };

template <int Rank>
struct Floats {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[Rank] = {};
  int64_t stride[Rank] = {};

  VTP_INLINE explicit operator bool() const { return data != nullptr; }
};

template <class T, int Rank>
VTP_INLINE View<T, Rank> view_as(const Floats<Rank>& floats) {
  View<T, Rank> view;
  view.data = static_cast<T*>(floats.data);
  for (int i = 0; i < Rank; ++i) {
    view.size[i] = floats.size[i];
    view.stride[i] = floats.stride[i];
  }
  return view;
}

// Strided int32 or int64.
template <int Rank>
struct Integers {
  const void* data = nullptr;
  bool is_int64 = false;
  int64_t stride[Rank] = {};  // in elements

  VTP_INLINE explicit operator bool() const { return data != nullptr; }

  template <class... Index>
  VTP_INLINE int64_t at(Index... index) const {
    const int64_t position[] = {static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (unsigned i = 0; i < sizeof...(Index); ++i) offset += position[i] * stride[i];
    return is_int64 ? static_cast<const int64_t*>(data)[offset]
                    : static_cast<const int32_t*>(data)[offset];
  }
};

// An element of a bool tensor. In torch any byte but 0 is True (`uint8.view(torch.bool)`), while a
// C++ bool may only be 0 or 1, which compilers count on: masks are read as bytes.
struct MaskByte {
  uint8_t byte;

  VTP_INLINE operator bool() const { return byte != 0; }
};

// Arrays without data are absent options.
using Mask = View<const MaskByte, 2>;

enum class HeadReduce : uint8_t { mean, max, sum };
enum class Rule : uint8_t { chord, kneedle, iqr, mass };
enum class VisualRows : uint8_t { prefix, causal, skip };
enum class Diversity : uint8_t { maxmin, dpp };
enum class MergeMode : uint8_t { mean, add_mean, weighted };

struct AttentionScores {
  Floats<4> query;                         // [B, Hq, M, D]
  Floats<4> key;                           // [B, Hkv, S, D]
  Mask candidates, valid;                  // [B, S]
  View<const int64_t, 2> query_positions;  // [B, M]
  Mask query_valid;                        // [B, M]
  Floats<3> lse;                           // [B, Hq, M], the dtype of scores
  double scale = 1.0;
  bool candidates_only = false;  // softmax over the candidates alone
  HeadReduce head_reduce = HeadReduce::mean;
  void* scores = nullptr;  // [B, S], float or, for double inputs, double
};

struct TokenContribution {
  Floats<3> query;         // [B, Hq, D]
  Floats<4> key, value;    // [B, Hkv, S, D]
  Mask candidates, valid;  // [B, S]
  double scale = 1.0;
  void *cosine = nullptr, *norm = nullptr;  // [B, S], float or, for double inputs, double
};

struct CosineSimilarity {
  Floats<3> features;          // [B, N, C]
  Floats<2> cls;               // [B, C]
  void* similarity = nullptr;  // [B, N], float or, for double inputs, double
};

struct PassiveAttention {
  Floats<4> query, key, value;  // [B, Hq | Hkv, S, D]
  Mask visual, valid;           // [B, S]
  bool merge = true;            // sink: the first visual key takes the visual mass, or nobody does
  VisualRows visual_rows = VisualRows::prefix;
  bool renormalize = false;
  double scale = 1.0;
  void* output = nullptr;  // [B, Hq, S, D], the dtype of query
};

struct SelectTopk {
  Floats<2> scores;       // [B, S]
  int64_t k = 0;          // for all rows, unless
  Integers<1> k_per_row;  // [B] is given; negative counts as 0
  Mask candidates, keep;  // [B, S]
  bool has_threshold = false;
  double threshold = 0.0;
  int64_t capacity = 0;
  int64_t* indices = nullptr;  // [B, capacity]
  int32_t* counts = nullptr;   // [B]
};

struct SelectDiverse {
  Floats<3> features;     // [B, N, C]
  int64_t k = 0;          // for all rows, unless
  Integers<1> k_per_row;  // [B] is given; negative counts as 0
  Diversity rule = Diversity::maxmin;
  Floats<2> relevance;    // [B, N], float or, for double features, double; absent: ones
  Mask candidates, keep;  // [B, N]
  int64_t first = -1;     // the row that maxmin begins with where nothing is kept; -1: the farthest
  int64_t capacity = 0;
  int64_t* indices = nullptr;  // [B, capacity]
  int32_t* counts = nullptr;   // [B]
};

// dpp: a row is a combination of those chosen, but for rounding, once no more than this share of its
// own square is left.
constexpr double kNothingLeft = 1e-5;

// select.scores views what `attention` writes to its scores.
struct AttentionTopk {
  AttentionScores attention;
  SelectTopk select;
};

struct Inflection {
  Floats<2> curve;  // [B, N]
  Rule rule = Rule::chord;
  int64_t min_keep = 1;
  int64_t capacity = 0;  // min(max_keep, N)
  double clip_quantile = 1.0, sensitivity = 1.0, mass = 0.9;
  int64_t* indices = nullptr;  // [B, capacity]
  int32_t* counts = nullptr;   // [B]
};

// inflection.curve views what `similarity` writes.
struct ClsInflection {
  CosineSimilarity similarity;
  Inflection inflection;
};

// How far below the chord, as a share of the larger of its two ends, a curve may lie by rounding:
// the epsilon of the scores' dtype; eight of float64, in which distances are computed, too.
VTP_INLINE double chord_epsilon(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return 0x1p-10;
    case DType::bf16:
      return 0x1p-7;
    case DType::f32:
      return 0x1p-23;
    case DType::f64:
      break;
  }
  return 0x1p-49;
}

// Which row goes where: slot p of a row of slots takes source row indices[p] while p < count.
struct RowIndices {
  View<const int64_t, 4> indices;  // [L, B, H, K]; stride 0 where shared
  Integers<3> counts;              // [L, B, H]; absent: all K are real
};

// One tensor of rows: heads is 1 where a tensor has none.
struct RowTensor {
  const char* source = nullptr;
  char* target = nullptr;  // == source: in place
  int64_t layer = 0, batch = 0, heads = 0;
  int64_t row_bytes = 0;
  int64_t source_stride[3] = {};  // bytes: batch, head, row
  int64_t target_stride[3] = {};
};

struct CompactRows {
  const RowTensor* tensors = nullptr;
  int64_t tensor_count = 0;
  RowIndices rows;
  bool align_right = false;  // padding first
};

struct AssignRows {
  Floats<3> keys;                  // [B, N, D]
  View<const int64_t, 2> targets;  // [B, T]: rows; what is outside [0, N) is padding
  Mask candidates;                 // [B, N]
  int64_t* assignment = nullptr;   // [B, N]
};

struct MergeRows {
  Floats<3> features;                 // [B, N, C]
  View<const int64_t, 2> assignment;  // [B, N]: what is outside [0, T) is left out
  View<const int64_t, 2> targets;     // [B, T]: rows; what is outside [0, N) is padding
  Floats<2> weights;                  // [B, N], float or, for double features, double
  MergeMode mode = MergeMode::mean;
  void* merged = nullptr;  // [B, T, C], the dtype of features
};

}  // namespace vtp
