// The ops as torch calls them: schemas, and for every op one function that checks the tensors, makes
// the outputs and hands raw pointers to the kernels. Written once for all devices, on libtorch's
// stable ABI, so one binary loads on every torch from 2.10 on. With bindings.cpp the only code that
// knows torch.
//
// The Python layer has checked arguments and says what is wrong in its own words; the checks here
// are those that keep a direct call of torch.ops.vtp_kernels.* from reading or writing out of
// bounds.
//
// A Device is made from an op's first tensor and says where tensors must be (`holds`, `name`), makes
// new ones (`empty`) and runs kernels (`run`). `kReadsValues`: tensors can be looked into, so values
// such as indices are checked too. `kServesFloat64`: so they do.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda_ops.h"

namespace vtp {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class... Parts>
void check(bool ok, const Parts&... message) {
  if (ok) return;
  std::ostringstream text;
  text << "vtp_kernels: ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// ---- Reading tensors ----------------------------------------------------------------------------

namespace dtypes {
inline const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
inline const int32_t f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
inline const int32_t i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
inline const int32_t u8 = aoti_torch_dtype_uint8(), boolean = aoti_torch_dtype_bool();
}  // namespace dtypes

constexpr int64_t kAny = -1;
constexpr int64_t kMaxHeadDim = 256;

// Kernels count positions in int32, and a loop's last step may go past the end.
constexpr int64_t kMaxSize = (int64_t{1} << 31) - (1 << 16);

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// What numbers of that type are scored, or added up, in.
inline DType score_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline int32_t score_dtype(DType dtype) { return dtype == DType::f64 ? dtypes::f64 : dtypes::f32; }

inline int64_t element_bytes(const Tensor& t) { return static_cast<int64_t>(t.element_size()); }

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::string text = "[";
  for (int64_t i = 0; i < rank; ++i) {
    text += (i ? ", " : "") + (sizes[i] == kAny ? std::string("*") : std::to_string(sizes[i]));
  }
  return text + "]";
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type,
                            int32_t device_index) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// Checks tensors and turns them into views.
template <class Device>
class Reader {
 public:
  explicit Reader(const Device& device) : device_(device) {}

  // Device, rank, sizes and that rows are contiguous; fills in size and stride of the view.
  template <class Strided, int Rank>
  void shape(Strided& view, const char* name, const Tensor& t,
             const int64_t (&expected)[Rank]) const {
    where(name, t);
    const auto sizes = t.sizes(), strides = t.strides();
    bool fits = sizes.size() == Rank;
    for (int i = 0; fits && i < Rank; ++i) {
      fits = expected[i] == kAny || sizes[i] == expected[i];
    }
    check(fits, name, " must have shape ", shape_text(expected, Rank), ", got ",
          shape_text(sizes.data(), sizes.size()));
    small_enough(name, t);
    check(sizes[Rank - 1] <= 1 || strides[Rank - 1] == 1, name,
          " must have stride 1 in its last dimension");
    for (int i = 0; i < Rank; ++i) {
      view.size[i] = sizes[i];
      view.stride[i] = strides[i];
    }
  }

  static void small_enough(const char* name, const Tensor& t) {
    for (const int64_t size : t.sizes()) {
      check(size <= kMaxSize, name, " must have at most ", kMaxSize,
            " entries in every dimension, got ", shape_text(t.sizes().data(), t.dim()));
    }
  }

  void where(const char* name, const Tensor& t) const {
    check(device_.holds(t), name, " must be on ", device_.name());
  }

  template <class T, int Rank>
  View<const T, Rank> view(const char* name, const OptionalTensor& t, int32_t dtype,
                           const int64_t (&expected)[Rank]) const {
    View<const T, Rank> view;
    if (!t) return view;
    shape(view, name, *t, expected);
    check(dtype_of(*t) == dtype, name, " has the wrong dtype");
    view.data = data_of<const T>(*t);
    return view;
  }

  template <int Rank>
  Mask mask(const char* name, const OptionalTensor& t, const int64_t (&expected)[Rank]) const {
    return view<MaskByte>(name, t, dtypes::boolean, expected);
  }

  template <int Rank>
  Floats<Rank> floats(const char* name, const Tensor& t, const int64_t (&expected)[Rank]) const {
    Floats<Rank> floats;
    shape(floats, name, t, expected);
    floats.dtype = float_type(name, dtype_of(t));
    floats.data = t.data_ptr();
    return floats;
  }

  template <int Rank>
  Floats<Rank> floats_like(const char* name, const Tensor& t, DType dtype,
                           const int64_t (&expected)[Rank]) const {
    const auto view = floats(name, t, expected);
    check(view.dtype == dtype, name, " has the wrong dtype");
    return view;
  }

  // int32 or int64, any strides.
  Integers<1> integers(const char* name, const Tensor& t, int64_t expected) const {
    where(name, t);
    check(t.dim() == 1 && t.size(0) == expected, name, " must have shape [", expected, "], got ",
          shape_text(t.sizes().data(), t.sizes().size()));
    Integers<1> integers;
    integers.is_int64 = is_int64(name, t);
    integers.data = t.data_ptr();
    integers.stride[0] = t.stride(0);
    return integers;
  }

  static bool is_int64(const char* name, const Tensor& t) {
    const int32_t dtype = dtype_of(t);
    check(dtype == dtypes::i32 || dtype == dtypes::i64, name, " must be int32 or int64");
    return dtype == dtypes::i64;
  }

 private:
  static DType float_type(const char* name, int32_t dtype) {
    if (dtype == dtypes::f32) return DType::f32;
    if (dtype == dtypes::f16) return DType::f16;
    if (dtype == dtypes::bf16) return DType::bf16;
    check(Device::kServesFloat64 && dtype == dtypes::f64, name, " must be float16, bfloat16",
          Device::kServesFloat64 ? ", float32 or float64" : " or float32");
    return DType::f64;
  }

  const Device& device_;
};

// A `str` argument. (Unboxing it as std::string leaks one, as of torch 2.13.)
class Text {
 public:
  explicit Text(StringHandle handle) {
    const char* data;
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &size));
    value_.assign(data, size);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  }

  // Position among the choices.
  int choose(const char* name, std::initializer_list<const char*> choices) const {
    const auto at = std::find(choices.begin(), choices.end(), value_);
    check(at != choices.end(), name, " has no option '", value_, "'");
    return static_cast<int>(at - choices.begin());
  }

 private:
  std::string value_;
};

template <class Query>
void check_heads(const Query& query, const Floats<4>& key) {
  const int64_t heads = query.size[1], kv_heads = key.size[1], dim = key.size[3];
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query's ", heads,
        " heads must be a multiple of key's ", kv_heads);
  check(dim > 0 && dim <= kMaxHeadDim, "the head dim must be within [1, ", kMaxHeadDim, "], got ",
        dim);
}

// indices [B, K], [L, B, K] or [L, B, H, K] and the counts that go with them, seen as [L, B, H, K].
struct Rows {
  RowIndices view;
  int64_t layers = 1, heads = 1;  // 1: shared by all
  int64_t slots = 0;

  template <class Device>
  Rows(const Device& device, const Tensor& indices, const OptionalTensor& counts) {
    const Reader<Device> read(device);
    const auto sizes = indices.sizes(), strides = indices.strides();
    const int64_t rank = sizes.size();
    read.where("indices", indices);
    check(dtype_of(indices) == dtypes::i64, "indices must be int64");
    check(rank >= 2 && rank <= 4, "indices must have 2 to 4 dimensions, got ", rank);
    read.small_enough("indices", indices);
    view.indices.data = data_of<const int64_t>(indices);
    // Where each of [L, B, H, K] is among the dimensions; -1: not there.
    const int from[4] = {rank > 2 ? 0 : -1, rank > 2 ? 1 : 0, rank > 3 ? 2 : -1,
                         static_cast<int>(rank) - 1};
    for (int i = 0; i < 4; ++i) {
      view.indices.size[i] = from[i] < 0 ? 1 : sizes[from[i]];
      view.indices.stride[i] = from[i] < 0 ? 0 : strides[from[i]];
    }
    const auto& size = view.indices.size;
    layers = size[0], heads = size[2], slots = size[3];
    if (!counts) return;
    read.where("counts", *counts);
    bool fits = static_cast<int64_t>(counts->sizes().size()) == rank - 1;
    for (int64_t i = 0; fits && i < rank - 1; ++i) fits = counts->size(i) == sizes[i];
    check(fits, "counts must have the shape of indices without its last dimension, ",
          shape_text(sizes.data(), rank - 1), ", got ",
          shape_text(counts->sizes().data(), counts->sizes().size()));
    view.counts.is_int64 = read.is_int64("counts", *counts);
    view.counts.data = counts->data_ptr();
    for (int i = 0; i < 3; ++i) view.counts.stride[i] = from[i] < 0 ? 0 : counts->stride(from[i]);
    // Data that is never null, else no counts and counts of no rows would look alike.
    if (counts->numel() == 0) view.counts.data = &view;
  }

  // Every real index of a layer must ascend within [0, length).
  void check_range(int64_t layer, int64_t length) const {
    for (int64_t b = 0; b < view.indices.size[1]; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t count = view.counts ? view.counts.at(layer, b, h) : slots;
        check(count >= 0 && count <= slots, "counts must be within [0, ", slots, "], got ", count);
        int64_t last = -1;
        for (int64_t slot = 0; slot < count; ++slot) {
          const int64_t index = *view.indices.at(layer, b, h, slot);
          check(index >= 0 && index < length, "indices must be within [0, ", length, "), got ",
                index);
          check(index > last, "indices must ascend strictly within a row, got ", last, ", ", index);
          last = index;
        }
      }
    }
  }
};

// The RowTensor of a [B, H, S, D] tensor; `target` as well, or null for in place.
inline RowTensor heads_of_rows(const Tensor& source, const Tensor* target, int64_t layer) {
  const int64_t bytes = element_bytes(source);
  const Tensor& to = target ? *target : source;
  RowTensor t;
  t.source = data_of<const char>(source);
  t.target = data_of<char>(to);
  t.layer = layer, t.batch = source.size(0), t.heads = source.size(1);
  t.row_bytes = source.size(3) * bytes;
  for (int i = 0; i < 3; ++i) {
    t.source_stride[i] = source.stride(i) * bytes;
    t.target_stride[i] = to.stride(i) * bytes;
  }
  return t;
}

// ---- The ops ------------------------------------------------------------------------------------

template <class Device>
struct Ops {
  using Read = Reader<Device>;

  static AttentionScores read_attention(const Read& read, const Tensor& query, const Tensor& key,
                                        const Tensor& candidates, const OptionalTensor& valid,
                                        const OptionalTensor& query_positions,
                                        const OptionalTensor& query_valid,
                                        const OptionalTensor& lse, double scale,
                                        const Text& support, const Text& head_reduce) {
    AttentionScores a;
    a.query = read.floats("query", query, {kAny, kAny, kAny, kAny});
    const auto [batch, heads, rows, dim] = a.query.size;
    a.key = read.floats_like("key", key, a.query.dtype, {batch, kAny, kAny, dim});
    check_heads(a.query, a.key);
    const int64_t length = a.key.size[2];
    a.candidates = read.mask("candidates", candidates, {batch, length});
    a.valid = read.mask("valid", valid, {batch, length});
    a.query_positions = read.template view<int64_t>("query_positions", query_positions, dtypes::i64,
                                                    {batch, rows});
    a.query_valid = read.mask("query_valid", query_valid, {batch, rows});
    const DType scores = score_type(a.query.dtype);
    if (lse) a.lse = read.floats_like("lse", *lse, scores, {batch, heads, rows});
    a.scale = scale;
    a.candidates_only = support.choose("support", {"all", "candidates"}) == 1;
    a.head_reduce =
        static_cast<HeadReduce>(head_reduce.choose("head_reduce", {"mean", "max", "sum"}));
    return a;
  }

  static SelectTopk read_selection(const Read& read, const Floats<2>& scores,
                                   const OptionalTensor& k_per_row, int64_t k,
                                   const OptionalTensor& candidates, const OptionalTensor& keep,
                                   std::optional<double> threshold, int64_t capacity) {
    SelectTopk a;
    a.scores = scores;
    const auto [batch, length] = scores.size;
    a.k = k;
    if (k_per_row) a.k_per_row = read.integers("k_per_row", *k_per_row, batch);
    a.candidates = read.mask("candidates", candidates, {batch, length});
    a.keep = read.mask("keep", keep, {batch, length});
    a.has_threshold = threshold.has_value();
    a.threshold = threshold.value_or(0.0);
    check(capacity >= 0, "capacity must be at least 0, got ", capacity);
    a.capacity = capacity;
    return a;
  }

  // Makes the outputs of a selection of [batch, capacity].
  template <class Arguments>
  static std::tuple<Tensor, Tensor> selected(const Device& device, int64_t batch, Arguments& a) {
    Tensor indices = device.empty({batch, a.capacity}, dtypes::i64);
    Tensor counts = device.empty({batch}, dtypes::i32);
    a.indices = data_of<int64_t>(indices);
    a.counts = data_of<int32_t>(counts);
    return {indices, counts};
  }

  static Tensor attention_scores(Tensor query, Tensor key, Tensor candidates, OptionalTensor valid,
                                 OptionalTensor query_positions, OptionalTensor query_valid,
                                 OptionalTensor lse, double scale, StringHandle support,
                                 StringHandle head_reduce) {
    const Text support_text(support), reduce_text(head_reduce);
    const Device device(query);
    AttentionScores a =
        read_attention(Read(device), query, key, candidates, valid, query_positions, query_valid,
                       lse, scale, support_text, reduce_text);
    Tensor scores = device.empty({a.key.size[0], a.key.size[2]}, score_dtype(a.query.dtype));
    a.scores = scores.data_ptr();
    device.run(a);
    return scores;
  }

  static std::tuple<Tensor, Tensor> select_topk(Tensor scores, OptionalTensor k_per_row, int64_t k,
                                                OptionalTensor candidates, OptionalTensor keep,
                                                std::optional<double> threshold, int64_t capacity) {
    const Device device(scores);
    const Read read(device);
    SelectTopk a = read_selection(read, read.floats("scores", scores, {kAny, kAny}), k_per_row, k,
                                  candidates, keep, threshold, capacity);
    const auto selection = selected(device, a.scores.size[0], a);
    device.run(a);
    return selection;
  }

  static std::tuple<Tensor, Tensor> select_diverse(Tensor features, OptionalTensor k_per_row,
                                                   int64_t k, StringHandle rule,
                                                   OptionalTensor relevance,
                                                   OptionalTensor candidates, OptionalTensor keep,
                                                   int64_t first, int64_t capacity) {
    const Text rule_text(rule);
    const Device device(features);
    const Read read(device);
    SelectDiverse a;
    a.features = read.floats("features", features, {kAny, kAny, kAny});
    const auto [batch, length, channels] = a.features.size;
    check(channels > 0, "features must have at least 1 channel, got 0");
    a.k = k;
    if (k_per_row) a.k_per_row = read.integers("k_per_row", *k_per_row, batch);
    a.rule = static_cast<Diversity>(rule_text.choose("rule", {"maxmin", "dpp"}));
    const DType scores = score_type(a.features.dtype);
    if (relevance) a.relevance = read.floats_like("relevance", *relevance, scores, {batch, length});
    a.candidates = read.mask("candidates", candidates, {batch, length});
    a.keep = read.mask("keep", keep, {batch, length});
    check(first >= -1 && first < length, "first must be within [-1, ", length, "), got ", first);
    a.first = first;
    check(capacity >= 0, "capacity must be at least 0, got ", capacity);
    a.capacity = capacity;
    const auto selection = selected(device, batch, a);
    device.run(a);
    return selection;
  }

  static std::tuple<Tensor, Tensor, Tensor> attention_topk(
      Tensor query, Tensor key, OptionalTensor k_per_row, int64_t k, Tensor candidates,
      OptionalTensor valid, OptionalTensor query_positions, OptionalTensor query_valid,
      OptionalTensor lse, double scale, StringHandle support, StringHandle head_reduce,
      OptionalTensor keep, std::optional<double> threshold, int64_t capacity) {
    const Text support_text(support), reduce_text(head_reduce);
    const Device device(query);
    const Read read(device);
    AttentionTopk a;
    a.attention = read_attention(read, query, key, candidates, valid, query_positions, query_valid,
                                 lse, scale, support_text, reduce_text);
    const int64_t batch = a.attention.key.size[0], length = a.attention.key.size[2];
    Tensor scores = device.empty({batch, length}, score_dtype(a.attention.query.dtype));
    a.attention.scores = scores.data_ptr();
    a.select = read_selection(read, read.floats("scores", scores, {batch, length}), k_per_row, k,
                              candidates, keep, threshold, capacity);
    const auto [indices, counts] = selected(device, batch, a.select);
    device.run(a);
    return {indices, counts, scores};
  }

  static std::tuple<Tensor, Tensor> token_contribution(Tensor query, Tensor key, Tensor value,
                                                       Tensor candidates, OptionalTensor valid,
                                                       double scale) {
    const Device device(query);
    const Read read(device);
    TokenContribution a;
    a.query = read.floats("query", query, {kAny, kAny, kAny});
    const auto [batch, heads, dim] = a.query.size;
    a.key = read.floats_like("key", key, a.query.dtype, {batch, kAny, kAny, dim});
    check_heads(a.query, a.key);
    const int64_t length = a.key.size[2];
    a.value =
        read.floats_like("value", value, a.query.dtype, {batch, a.key.size[1], length, dim});
    a.candidates = read.mask("candidates", candidates, {batch, length});
    a.valid = read.mask("valid", valid, {batch, length});
    a.scale = scale;

    Tensor cosine = device.empty({batch, length}, score_dtype(a.query.dtype));
    Tensor norm = device.empty({batch, length}, score_dtype(a.query.dtype));
    a.cosine = cosine.data_ptr();
    a.norm = norm.data_ptr();
    device.run(a);
    return {cosine, norm};
  }

  static Tensor passive_attention(Tensor query, Tensor key, Tensor value, Tensor visual,
                                  OptionalTensor valid, StringHandle sink, StringHandle visual_rows,
                                  bool renormalize, double scale) {
    const Text sink_text(sink), rows_text(visual_rows);
    const Device device(query);
    const Read read(device);
    PassiveAttention a;
    a.query = read.floats("query", query, {kAny, kAny, kAny, kAny});
    const auto [batch, heads, length, dim] = a.query.size;
    a.key = read.floats_like("key", key, a.query.dtype, {batch, kAny, length, dim});
    check_heads(a.query, a.key);
    a.value =
        read.floats_like("value", value, a.query.dtype, {batch, a.key.size[1], length, dim});
    a.visual = read.mask("visual", visual, {batch, length});
    a.valid = read.mask("valid", valid, {batch, length});
    a.merge = sink_text.choose("sink", {"merge", "drop"}) == 0;
    a.visual_rows =
        static_cast<VisualRows>(rows_text.choose("visual_rows", {"prefix", "causal", "skip"}));
    a.renormalize = renormalize;
    a.scale = scale;

    Tensor output = device.empty({batch, heads, length, dim}, dtype_of(query));
    a.output = output.data_ptr();
    device.run(a);
    return output;
  }

  static Inflection inflection_of(const Floats<2>& curve, const Text& rule, int64_t min_keep,
                                  std::optional<int64_t> max_keep, double clip_quantile,
                                  double sensitivity, double mass) {
    Inflection a;
    a.curve = curve;
    const int64_t length = curve.size[1];
    a.rule = static_cast<Rule>(rule.choose("rule", {"chord", "kneedle", "iqr", "mass"}));
    check(min_keep >= 0 && max_keep.value_or(0) >= 0, "min_keep and max_keep must be at least 0");
    check(clip_quantile > 0.0 && clip_quantile <= 1.0, "clip_quantile must be within (0, 1], got ",
          clip_quantile);
    a.min_keep = min_keep;
    a.capacity = std::min<int64_t>(max_keep.value_or(length), length);
    a.clip_quantile = clip_quantile;
    a.sensitivity = sensitivity;
    a.mass = mass;
    return a;
  }

  static std::tuple<Tensor, Tensor> inflection(Tensor curve, StringHandle rule, int64_t min_keep,
                                               std::optional<int64_t> max_keep,
                                               double clip_quantile, double sensitivity,
                                               double mass) {
    const Text rule_text(rule);
    const Device device(curve);
    Inflection a = inflection_of(Read(device).floats("curve", curve, {kAny, kAny}), rule_text,
                                 min_keep, max_keep, clip_quantile, sensitivity, mass);
    const auto selection = selected(device, a.curve.size[0], a);
    device.run(a);
    return selection;
  }

  static std::tuple<Tensor, Tensor, Tensor> cls_inflection(Tensor features, Tensor cls,
                                                           StringHandle rule, int64_t min_keep,
                                                           std::optional<int64_t> max_keep,
                                                           double clip_quantile, double sensitivity,
                                                           double mass) {
    const Text rule_text(rule);
    const Device device(features);
    const Read read(device);
    ClsInflection a;
    CosineSimilarity& s = a.similarity;
    s.features = read.floats("features", features, {kAny, kAny, kAny});
    const auto [batch, length, channels] = s.features.size;
    s.cls = read.floats_like("cls", cls, s.features.dtype, {batch, channels});
    Tensor similarity = device.empty({batch, length}, score_dtype(s.features.dtype));
    s.similarity = similarity.data_ptr();
    a.inflection = inflection_of(read.floats("similarity", similarity, {batch, length}), rule_text,
                                 min_keep, max_keep, clip_quantile, sensitivity, mass);
    const auto [indices, counts] = selected(device, batch, a.inflection);
    device.run(a);
    return {indices, counts, similarity};
  }

  static void check_layers(const Device& device, const Tensors& keys, const Tensors& values,
                           const Rows& rows) {
    const Read read(device);
    const int64_t layers = keys.size();
    check(values.size() == keys.size(), "values must have as many layers as keys, ", layers,
          ", got ", values.size());
    check(rows.view.indices.stride[0] == 0 || rows.layers == layers, "indices must have ", layers,
          " layers, got ", rows.layers);
    const int64_t batch = rows.view.indices.size[1];
    int64_t heads = kAny, shortest = std::numeric_limits<int64_t>::max();
    for (int64_t layer = 0; layer < layers; ++layer) {
      Floats<4> key, value;  // shapes alone, any dtype will do
      read.shape(key, "keys", keys[layer], {batch, heads, kAny, kAny});
      read.shape(value, "values", values[layer], {batch, key.size[1], key.size[2], key.size[3]});
      heads = key.size[1];
      check(rows.heads == 1 || rows.heads == heads, "indices must have ", heads, " heads, got ",
            rows.heads);
      shortest = std::min(shortest, key.size[2]);
      if (Device::kReadsValues && rows.layers > 1) rows.check_range(layer, key.size[2]);
    }
    if (Device::kReadsValues && rows.layers == 1 && layers > 0) rows.check_range(0, shortest);
  }

  static Tensors compact_kv(Tensors keys, Tensors values, Tensor indices, OptionalTensor counts) {
    const Device device(indices);
    const Rows rows(device, indices, counts);
    check_layers(device, keys, values, rows);
    Tensors out;
    std::vector<RowTensor> tensors;
    for (const Tensors* side : {&keys, &values}) {
      for (size_t layer = 0; layer < side->size(); ++layer) {
        const Tensor& x = (*side)[layer];
        out.push_back(device.empty({x.size(0), x.size(1), rows.slots, x.size(3)}, dtype_of(x)));
        tensors.push_back(heads_of_rows(x, &out.back(), layer));
      }
    }
    device.run(CompactRows{tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, false});
    return out;
  }

  static void compact_kv_(Tensors keys, Tensors values, Tensor indices, OptionalTensor counts) {
    const Device device(indices);
    const Rows rows(device, indices, counts);
    check_layers(device, keys, values, rows);
    std::vector<RowTensor> tensors;
    for (const Tensors* side : {&keys, &values}) {
      for (size_t layer = 0; layer < side->size(); ++layer) {
        tensors.push_back(heads_of_rows((*side)[layer], nullptr, layer));
      }
    }
    device.run_in_place({tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, false});
  }

  static Tensors compact_rows(Tensors sources, Tensor indices, OptionalTensor counts,
                              StringHandle align) {
    const Text align_text(align);
    const Device device(indices);
    const Rows rows(device, indices, counts);
    check(indices.dim() == 2, "indices must have 2 dimensions, got ", indices.dim());
    const int64_t batch = indices.size(0);
    Tensors out;
    std::vector<RowTensor> tensors;
    for (Tensor& x : sources) {
      check(device.holds(x) && x.dim() >= 2 && x.size(0) == batch, "tensors must be [", batch,
            ", S, ...] on ", device.name());
      Read::small_enough("tensors", x);
      std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
      if (Device::kReadsValues) rows.check_range(0, sizes[1]);
      sizes[1] = rows.slots;
      int64_t row_elements = 1;
      bool dense_rows = true;
      for (size_t i = sizes.size(); i-- > 2;) {
        dense_rows = dense_rows && (sizes[i] <= 1 || x.stride(i) == row_elements);
        row_elements *= sizes[i];
      }
      check(row_elements <= kMaxSize, "tensors must have at most ", kMaxSize,
            " elements in a row, got ", shape_text(x.sizes().data(), x.dim()));
      if (!dense_rows) x = torch::stable::contiguous(x);
      out.push_back(device.empty(sizes, dtype_of(x)));

      const int64_t bytes = element_bytes(x);
      RowTensor t;
      t.source = data_of<const char>(x);
      t.target = data_of<char>(out.back());
      t.batch = batch, t.heads = 1, t.row_bytes = row_elements * bytes;
      t.source_stride[0] = x.stride(0) * bytes, t.source_stride[2] = x.stride(1) * bytes;
      t.target_stride[0] = rows.slots * t.row_bytes, t.target_stride[2] = t.row_bytes;
      tensors.push_back(t);
    }
    const bool right = align_text.choose("align", {"left", "right"}) == 1;
    device.run(CompactRows{tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, right});
    return out;
  }

  static Tensor assign_rows(Tensor keys, Tensor targets, OptionalTensor candidates) {
    const Device device(keys);
    const Read read(device);
    AssignRows a;
    a.keys = read.floats("keys", keys, {kAny, kAny, kAny});
    const auto [batch, length, dim] = a.keys.size;
    a.targets = read.template view<int64_t>("targets", targets, dtypes::i64, {batch, kAny});
    a.candidates = read.mask("candidates", candidates, {batch, length});
    if (Device::kReadsValues) check_targets(a.targets, length);

    Tensor assignment = device.empty({batch, length}, dtypes::i64);
    a.assignment = data_of<int64_t>(assignment);
    device.run(a);
    return assignment;
  }

  static Tensor merge_rows(Tensor features, Tensor assignment, Tensor targets,
                           OptionalTensor weights, StringHandle mode) {
    const Text mode_text(mode);
    const Device device(features);
    const Read read(device);
    MergeRows a;
    a.features = read.floats("features", features, {kAny, kAny, kAny});
    const auto [batch, length, channels] = a.features.size;
    a.assignment =
        read.template view<int64_t>("assignment", assignment, dtypes::i64, {batch, length});
    a.targets = read.template view<int64_t>("targets", targets, dtypes::i64, {batch, kAny});
    a.mode = static_cast<MergeMode>(mode_text.choose("mode", {"mean", "add_mean", "weighted"}));
    const bool weighted = a.mode == MergeMode::weighted;
    check(weights.has_value() == weighted, "weights go with mode 'weighted' and with no other");
    const DType sums = score_type(a.features.dtype);
    if (weights) a.weights = read.floats_like("weights", *weights, sums, {batch, length});
    if (Device::kReadsValues) {
      check_targets(a.targets, length);
      check_assignment(a);
    }

    const int64_t groups = a.targets.size[1];
    Tensor merged = device.empty({batch, groups, channels}, dtype_of(features));
    a.merged = merged.data_ptr();
    device.run(a);
    return merged;
  }

  // Rows within [0, length), or -1, and none twice.
  static void check_targets(const View<const int64_t, 2>& targets, int64_t length) {
    for (int64_t b = 0; b < targets.size[0]; ++b) {
      std::vector<bool> seen(length);
      for (int64_t t = 0; t < targets.size[1]; ++t) {
        const int64_t row = *targets.at(b, t);
        if (row == -1) continue;
        check(row >= 0 && row < length, "targets must be within [0, ", length,
              "), or -1 for padding, got ", row);
        check(!seen[row], "targets must name no row twice, row ", row, " is there twice");
        seen[row] = true;
      }
    }
  }

  static void check_assignment(const MergeRows& a) {
    const int64_t groups = a.targets.size[1];
    for (int64_t b = 0; b < a.assignment.size[0]; ++b) {
      for (int64_t i = 0; i < a.assignment.size[1]; ++i) {
        const int64_t group = *a.assignment.at(b, i);
        check(group < groups, "assignment must be below the ", groups, " targets, got ", group);
        if (!a.weights) continue;
        const double weight = a.weights.dtype == DType::f64
                                  ? *view_as<const double>(a.weights).at(b, i)
                                  : *view_as<const float>(a.weights).at(b, i);
        check(weight >= 0.0 && weight <= std::numeric_limits<double>::max(),
              "weights must be finite and at least 0, got ", weight);
      }
    }
  }
};

// ---- A device that runs the CUDA kernels --------------------------------------------------------

// Memory says where the kernels' memory is and which stream they go to.
template <class Memory>
class CudaKernels : public Memory {
 public:
  static constexpr bool kReadsValues = false, kServesFloat64 = false;

  using Memory::Memory;

#define VTP_RUN(op, Arguments)                                      \
  void run(const Arguments& a) const {                              \
    const Tensor space = this->workspace(cuda::op##_workspace(a));  \
    cuda::op(a, space.data_ptr(), this->stream());                  \
  }
  VTP_RUN(attention_scores, AttentionScores)
  VTP_RUN(attention_topk, AttentionTopk)
  VTP_RUN(select_topk, SelectTopk)
  VTP_RUN(select_diverse, SelectDiverse)
  VTP_RUN(token_contribution, TokenContribution)
  VTP_RUN(passive_attention, PassiveAttention)
  VTP_RUN(inflection, Inflection)
  VTP_RUN(cls_inflection, ClsInflection)
  VTP_RUN(compact_rows, CompactRows)
  VTP_RUN(assign_rows, AssignRows)
  VTP_RUN(merge_rows, MergeRows)
#undef VTP_RUN

  void run_in_place(const CompactRows& a) const {
    const Tensor space = workspace(cuda::compact_rows_in_place_workspace(a));
    cuda::compact_rows_in_place(a, space.data_ptr(), this->stream());
  }

 private:
  // Freed when the call returns, while the kernels may still run: torch's allocator hands memory out
  // again in the order of the stream.
  Tensor workspace(size_t bytes) const {
    return this->empty({static_cast<int64_t>(bytes)}, dtypes::u8);
  }
};

// ---- Registration -------------------------------------------------------------------------------

using Library = torch::stable::detail::StableLibrary;

inline void define_ops(Library& m) {
  m.def(
      "attention_scores(Tensor query, Tensor key, Tensor candidates, Tensor? valid, Tensor? "
      "query_positions, "
      "Tensor? query_valid, Tensor? lse, float scale, str support, str head_reduce) -> Tensor");
  m.def(
      "select_topk(Tensor scores, Tensor? k_per_row, SymInt k, Tensor? candidates, Tensor? keep, "
      "float? threshold, "
      "SymInt capacity) -> (Tensor indices, Tensor counts)");
  m.def(
      "select_diverse(Tensor features, Tensor? k_per_row, SymInt k, str rule, Tensor? relevance, "
      "Tensor? candidates, Tensor? keep, int first, SymInt capacity) -> (Tensor indices, Tensor "
      "counts)");
  m.def(
      "attention_topk(Tensor query, Tensor key, Tensor? k_per_row, SymInt k, Tensor candidates, "
      "Tensor? valid, "
      "Tensor? query_positions, Tensor? query_valid, Tensor? lse, float scale, str support, str "
      "head_reduce, "
      "Tensor? keep, float? threshold, SymInt capacity) -> (Tensor indices, Tensor counts, Tensor "
      "scores)");
  m.def(
      "token_contribution(Tensor query, Tensor key, Tensor value, Tensor candidates, Tensor? "
      "valid, float scale) "
      "-> (Tensor cosine, Tensor norm)");
  m.def("compact_kv(Tensor[] keys, Tensor[] values, Tensor indices, Tensor? counts) -> Tensor[]");
  m.def(
      "compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor indices, Tensor? counts) -> ()");
  m.def("compact_rows(Tensor[] tensors, Tensor indices, Tensor? counts, str align) -> Tensor[]");
  m.def(
      "inflection(Tensor curve, str rule, int min_keep, int? max_keep, float clip_quantile, float "
      "sensitivity, "
      "float mass) -> (Tensor indices, Tensor counts)");
  m.def(
      "cls_inflection(Tensor features, Tensor cls, str rule, int min_keep, int? max_keep, float "
      "clip_quantile, "
      "float sensitivity, float mass) -> (Tensor indices, Tensor counts, Tensor similarity)");
  m.def(
      "passive_attention(Tensor query, Tensor key, Tensor value, Tensor visual, Tensor? valid, str "
      "sink, "
      "str visual_rows, bool renormalize, float scale) -> Tensor");
  m.def("assign_rows(Tensor keys, Tensor targets, Tensor? candidates) -> Tensor");
  m.def(
      "merge_rows(Tensor features, Tensor assignment, Tensor targets, Tensor? weights, str mode) "
      "-> Tensor");
}

template <class Device>
void implement_ops(Library& m) {
  m.impl("attention_scores", TORCH_BOX(&Ops<Device>::attention_scores));
  m.impl("select_topk", TORCH_BOX(&Ops<Device>::select_topk));
  m.impl("select_diverse", TORCH_BOX(&Ops<Device>::select_diverse));
  m.impl("attention_topk", TORCH_BOX(&Ops<Device>::attention_topk));
  m.impl("token_contribution", TORCH_BOX(&Ops<Device>::token_contribution));
  m.impl("compact_kv", TORCH_BOX(&Ops<Device>::compact_kv));
  m.impl("compact_kv_", TORCH_BOX(&Ops<Device>::compact_kv_));
  m.impl("compact_rows", TORCH_BOX(&Ops<Device>::compact_rows));
  m.impl("inflection", TORCH_BOX(&Ops<Device>::inflection));
  m.impl("cls_inflection", TORCH_BOX(&Ops<Device>::cls_inflection));
  m.impl("passive_attention", TORCH_BOX(&Ops<Device>::passive_attention));
  m.impl("assign_rows", TORCH_BOX(&Ops<Device>::assign_rows));
  m.impl("merge_rows", TORCH_BOX(&Ops<Device>::merge_rows));
}

}  // namespace vtp
