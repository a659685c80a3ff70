// The only file that knows torch: schemas, checks, dispatch keys. Built on libtorch's stable ABI,
// so one binary loads on every torch from 2.10 on.
//
// The Python layer has checked arguments and says what is wrong in its own words; the checks here
// are those that keep a direct call of torch.ops.vtp_kernels.* from reading or writing out of
// bounds.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
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

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace vtp::cpu {

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n, context);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

}  // namespace vtp::cpu

namespace vtp {
namespace {

using cpu::DType;
using cpu::Floats;
using cpu::Mask;
using cpu::View;
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

// ---- Reading tensors
// ---------------------------------------------------------------------------------

namespace dtypes {
const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
const int32_t f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
const int32_t i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
const int32_t boolean = aoti_torch_dtype_bool();
}  // namespace dtypes

constexpr int64_t kAny = -1;

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::string text = "[";
  for (int64_t i = 0; i < rank; ++i) {
    text += (i ? ", " : "") + (sizes[i] == kAny ? std::string("*") : std::to_string(sizes[i]));
  }
  return text + "]";
}

// Checks device, rank, sizes and that rows are contiguous; fills in size and stride of the view.
template <class Strided, int Rank>
void read_shape(Strided& view, const char* name, const Tensor& t, const int64_t (&expected)[Rank]) {
  check(t.is_cpu(), name, " must be on the CPU");
  const auto sizes = t.sizes(), strides = t.strides();
  bool fits = sizes.size() == Rank;
  for (int i = 0; fits && i < Rank; ++i) {
    fits = (expected[i] == kAny || sizes[i] == expected[i]) &&
           sizes[i] < std::numeric_limits<int32_t>::max();
  }
  check(fits, name, " must have shape ", shape_text(expected, Rank), ", got ",
        shape_text(sizes.data(), sizes.size()));
  check(sizes[Rank - 1] <= 1 || strides[Rank - 1] == 1, name,
        " must have stride 1 in its last dimension");
  for (int i = 0; i < Rank; ++i) {
    view.size[i] = sizes[i];
    view.stride[i] = strides[i];
  }
}

template <class T, int Rank>
View<const T, Rank> read(const char* name, const Tensor& t, int32_t dtype,
                         const int64_t (&expected)[Rank]) {
  View<const T, Rank> view;
  read_shape(view, name, t, expected);
  check(dtype_of(t) == dtype, name, " has the wrong dtype");
  view.data = static_cast<const T*>(t.data_ptr());
  return view;
}

template <class T, int Rank>
View<const T, Rank> read(const char* name, const OptionalTensor& t, int32_t dtype,
                         const int64_t (&expected)[Rank]) {
  return t ? read<T>(name, *t, dtype, expected) : View<const T, Rank>{};
}

template <int Rank>
Mask read_mask(const char* name, const OptionalTensor& t, const int64_t (&expected)[Rank]) {
  return read<bool>(name, t, dtypes::boolean, expected);
}

DType float_type(const char* name, int32_t dtype) {
  if (dtype == dtypes::f32) return DType::f32;
  if (dtype == dtypes::f64) return DType::f64;
  if (dtype == dtypes::f16) return DType::f16;
  check(dtype == dtypes::bf16, name, " must be float16, bfloat16, float32 or float64");
  return DType::bf16;
}

template <int Rank>
Floats<Rank> read_floats(const char* name, const Tensor& t, const int64_t (&expected)[Rank]) {
  Floats<Rank> floats;
  read_shape(floats, name, t, expected);
  floats.dtype = float_type(name, dtype_of(t));
  floats.data = t.data_ptr();
  return floats;
}

template <int Rank>
Floats<Rank> read_floats_like(const char* name, const Tensor& t, DType dtype,
                              const int64_t (&expected)[Rank]) {
  const auto floats = read_floats(name, t, expected);
  check(floats.dtype == dtype, name, " has the wrong dtype");
  return floats;
}

// int32 or int64, as int64.
std::vector<int64_t> read_integers(const char* name, const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  check(t.is_cpu(), name, " must be on the CPU");
  check(dtype == dtypes::i32 || dtype == dtypes::i64, name, " must be int32 or int64");
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  const int64_t size = dense.numel();
  std::vector<int64_t> out(size);
  if (dtype == dtypes::i32) {
    std::copy_n(static_cast<const int32_t*>(dense.data_ptr()), size, out.begin());
  } else {
    std::copy_n(static_cast<const int64_t*>(dense.data_ptr()), size, out.begin());
  }
  return out;
}

// ---- Making tensors
// ----------------------------------------------------------------------------------

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

int32_t score_dtype(DType dtype) { return dtype == DType::f64 ? dtypes::f64 : dtypes::f32; }

// ---- Options
// -----------------------------------------------------------------------------------------

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

constexpr int64_t kMaxHeadDim = 256;

template <class Query>
void check_heads(const Query& query, const Floats<4>& key) {
  const int64_t heads = query.size[1], kv_heads = key.size[1], dim = key.size[3];
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query's ", heads,
        " heads must be a multiple of key's ", kv_heads);
  check(dim > 0 && dim <= kMaxHeadDim, "the head dim must be within [1, ", kMaxHeadDim, "], got ",
        dim);
}

// ---- Scores
// ------------------------------------------------------------------------------------------

Tensor attention_scores(Tensor query, Tensor key, Tensor candidates, OptionalTensor valid,
                        OptionalTensor query_positions, OptionalTensor query_valid,
                        OptionalTensor lse, double scale, StringHandle support,
                        StringHandle head_reduce) {
  const Text support_text(support), reduce_text(head_reduce);
  cpu::AttentionScores a;
  a.query = read_floats("query", query, {kAny, kAny, kAny, kAny});
  const auto [batch, heads, rows, dim] = a.query.size;
  a.key = read_floats_like("key", key, a.query.dtype, {batch, kAny, kAny, dim});
  check_heads(a.query, a.key);
  const int64_t length = a.key.size[2];
  a.candidates = read_mask("candidates", candidates, {batch, length});
  a.valid = read_mask("valid", valid, {batch, length});
  a.query_positions = read<int64_t>("query_positions", query_positions, dtypes::i64, {batch, rows});
  a.query_valid = read_mask("query_valid", query_valid, {batch, rows});
  const int32_t dtype = score_dtype(a.query.dtype);
  if (lse) a.lse = read_floats_like("lse", *lse, float_type("lse", dtype), {batch, heads, rows});
  a.scale = scale;
  a.candidates_only = support_text.choose("support", {"all", "candidates"}) == 1;
  a.head_reduce =
      static_cast<cpu::HeadReduce>(reduce_text.choose("head_reduce", {"mean", "max", "sum"}));

  Tensor scores = empty({batch, length}, dtype);
  a.scores = scores.data_ptr();
  cpu::attention_scores(a);
  return scores;
}

std::tuple<Tensor, Tensor> token_contribution(Tensor query, Tensor key, Tensor value,
                                              Tensor candidates, OptionalTensor valid,
                                              double scale) {
  cpu::TokenContribution a;
  a.query = read_floats("query", query, {kAny, kAny, kAny});
  const auto [batch, heads, dim] = a.query.size;
  a.key = read_floats_like("key", key, a.query.dtype, {batch, kAny, kAny, dim});
  check_heads(a.query, a.key);
  const int64_t length = a.key.size[2];
  a.value = read_floats_like("value", value, a.query.dtype, {batch, a.key.size[1], length, dim});
  a.candidates = read_mask("candidates", candidates, {batch, length});
  a.valid = read_mask("valid", valid, {batch, length});
  a.scale = scale;

  Tensor cosine = empty({batch, length}, score_dtype(a.query.dtype));
  Tensor norm = empty({batch, length}, score_dtype(a.query.dtype));
  a.cosine = cosine.data_ptr();
  a.norm = norm.data_ptr();
  cpu::token_contribution(a);
  return {cosine, norm};
}

Tensor passive_attention(Tensor query, Tensor key, Tensor value, Tensor visual,
                         OptionalTensor valid, StringHandle sink, StringHandle visual_rows,
                         bool renormalize, double scale) {
  const Text sink_text(sink), rows_text(visual_rows);
  cpu::PassiveAttention a;
  a.query = read_floats("query", query, {kAny, kAny, kAny, kAny});
  const auto [batch, heads, length, dim] = a.query.size;
  a.key = read_floats_like("key", key, a.query.dtype, {batch, kAny, length, dim});
  check_heads(a.query, a.key);
  a.value = read_floats_like("value", value, a.query.dtype, {batch, a.key.size[1], length, dim});
  a.visual = read_mask("visual", visual, {batch, length});
  a.valid = read_mask("valid", valid, {batch, length});
  a.merge = sink_text.choose("sink", {"merge", "drop"}) == 0;
  a.visual_rows =
      static_cast<cpu::VisualRows>(rows_text.choose("visual_rows", {"prefix", "causal", "skip"}));
  a.renormalize = renormalize;
  a.scale = scale;

  Tensor output = empty({batch, heads, length, dim}, dtype_of(query));
  a.output = output.data_ptr();
  cpu::passive_attention(a);
  return output;
}

// ---- Selection
// ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> select_topk(Tensor scores, OptionalTensor k_per_row, int64_t k,
                                       OptionalTensor candidates, OptionalTensor keep,
                                       std::optional<double> threshold, int64_t capacity) {
  cpu::SelectTopk a;
  a.scores = read_floats("scores", scores, {kAny, kAny});
  const auto [batch, length] = a.scores.size;
  std::vector<int64_t> k_values = {k};
  if (k_per_row) {
    k_values = read_integers("k_per_row", *k_per_row);
    check(static_cast<int64_t>(k_values.size()) == batch, "k_per_row must have ", batch,
          " entries, got ", k_values.size());
    a.k_stride = 1;
  }
  a.k = k_values.data();
  a.candidates = read_mask("candidates", candidates, {batch, length});
  a.keep = read_mask("keep", keep, {batch, length});
  a.has_threshold = threshold.has_value();
  a.threshold = threshold.value_or(0.0);
  check(capacity >= 0, "capacity must be at least 0, got ", capacity);
  a.capacity = capacity;

  Tensor indices = empty({batch, capacity}, dtypes::i64), counts = empty({batch}, dtypes::i32);
  a.indices = data_of<int64_t>(indices);
  a.counts = data_of<int32_t>(counts);
  cpu::select_topk(a);
  return {indices, counts};
}

std::tuple<Tensor, Tensor, Tensor> attention_topk(
    Tensor query, Tensor key, OptionalTensor k_per_row, int64_t k, Tensor candidates,
    OptionalTensor valid, OptionalTensor query_positions, OptionalTensor query_valid,
    OptionalTensor lse, double scale, StringHandle support, StringHandle head_reduce,
    OptionalTensor keep, std::optional<double> threshold, int64_t capacity) {
  const Tensor scores = attention_scores(query, key, candidates, valid, query_positions,
                                         query_valid, lse, scale, support, head_reduce);
  const auto [indices, counts] =
      select_topk(scores, k_per_row, k, candidates, keep, threshold, capacity);
  return {indices, counts, scores};
}

std::tuple<Tensor, Tensor> inflection_of(const Floats<2>& curve, const Text& rule, int64_t min_keep,
                                         std::optional<int64_t> max_keep, double clip_quantile,
                                         double sensitivity, double mass) {
  cpu::Inflection a;
  a.curve = curve;
  const auto [batch, length] = curve.size;
  a.rule = static_cast<cpu::Rule>(rule.choose("rule", {"chord", "kneedle", "iqr", "mass"}));
  check(min_keep >= 0 && max_keep.value_or(0) >= 0, "min_keep and max_keep must be at least 0");
  check(clip_quantile > 0.0 && clip_quantile <= 1.0, "clip_quantile must be within (0, 1], got ",
        clip_quantile);
  a.min_keep = min_keep;
  a.capacity = std::min<int64_t>(max_keep.value_or(length), length);
  a.clip_quantile = clip_quantile;
  a.sensitivity = sensitivity;
  a.mass = mass;

  Tensor indices = empty({batch, a.capacity}, dtypes::i64), counts = empty({batch}, dtypes::i32);
  a.indices = data_of<int64_t>(indices);
  a.counts = data_of<int32_t>(counts);
  cpu::inflection(a);
  return {indices, counts};
}

std::tuple<Tensor, Tensor> inflection(Tensor curve, StringHandle rule, int64_t min_keep,
                                      std::optional<int64_t> max_keep, double clip_quantile,
                                      double sensitivity, double mass) {
  const Text rule_text(rule);
  return inflection_of(read_floats("curve", curve, {kAny, kAny}), rule_text, min_keep, max_keep,
                       clip_quantile, sensitivity, mass);
}

std::tuple<Tensor, Tensor, Tensor> cls_inflection(Tensor features, Tensor cls, StringHandle rule,
                                                  int64_t min_keep, std::optional<int64_t> max_keep,
                                                  double clip_quantile, double sensitivity,
                                                  double mass) {
  const Text rule_text(rule);
  cpu::CosineSimilarity a;
  a.features = read_floats("features", features, {kAny, kAny, kAny});
  const auto [batch, length, channels] = a.features.size;
  a.cls = read_floats_like("cls", cls, a.features.dtype, {batch, channels});
  Tensor similarity = empty({batch, length}, score_dtype(a.features.dtype));
  a.similarity = similarity.data_ptr();
  cpu::cosine_similarity(a);
  const auto [indices, counts] =
      inflection_of(read_floats("similarity", similarity, {batch, length}), rule_text, min_keep,
                    max_keep, clip_quantile, sensitivity, mass);
  return {indices, counts, similarity};
}

// ---- Compaction
// --------------------------------------------------------------------------------------

// indices [B, K], [L, B, K] or [L, B, H, K] and the counts that go with them, seen as [L, B, H, K].
struct Rows {
  Tensor tensor;
  std::vector<int64_t> count_values;
  cpu::RowIndices view;
  int64_t layers = 1, heads = 1;  // 1: shared by all
  int64_t slots = 0;

  Rows(const Tensor& indices, const OptionalTensor& counts) : tensor(indices) {
    const auto sizes = indices.sizes(), strides = indices.strides();
    const int64_t rank = sizes.size();
    check(indices.is_cpu() && dtype_of(indices) == dtypes::i64, "indices must be int64 on the CPU");
    check(rank >= 2 && rank <= 4, "indices must have 2 to 4 dimensions, got ", rank);
    view.indices.data = data_of<const int64_t>(indices);
    const int from[4] = {rank > 2 ? 0 : -1, rank > 2 ? 1 : 0, rank > 3 ? 2 : -1,
                         static_cast<int>(rank) - 1};
    for (int i = 0; i < 4; ++i) {
      view.indices.size[i] = from[i] < 0 ? 1 : sizes[from[i]];
      view.indices.stride[i] = from[i] < 0 ? 0 : strides[from[i]];
    }
    const auto& size = view.indices.size;
    layers = size[0], heads = size[2], slots = size[3];
    if (!counts) return;
    bool fits = static_cast<int64_t>(counts->sizes().size()) == rank - 1;
    for (int64_t i = 0; fits && i < rank - 1; ++i) fits = counts->size(i) == sizes[i];
    check(fits, "counts must have the shape of indices without its last dimension, ",
          shape_text(sizes.data(), rank - 1), ", got ",
          shape_text(counts->sizes().data(), counts->sizes().size()));
    count_values = read_integers("counts", *counts);
    // Data that is never null, else no counts and counts of no rows would look alike.
    if (count_values.empty()) count_values.push_back(0);
    view.counts.data = count_values.data();
    const int64_t stride[3] = {rank > 2 ? size[1] * size[2] : 0, size[2], rank > 3 ? 1 : 0};
    std::copy_n(stride, 3, view.counts.stride);
  }

  // Every real index of a layer must ascend within [0, length).
  void check_range(int64_t layer, int64_t length) const {
    for (int64_t b = 0; b < view.indices.size[1]; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t count = view.counts ? *view.counts.at(layer, b, h) : slots;
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

int64_t element_bytes(const Tensor& t) { return static_cast<int64_t>(t.element_size()); }

// The RowTensor of a [B, H, S, D] tensor; `target` as well, or null for in place.
cpu::RowTensor heads_of_rows(const Tensor& source, const Tensor* target, int64_t layer) {
  const int64_t bytes = element_bytes(source);
  const Tensor& to = target ? *target : source;
  cpu::RowTensor t;
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

void check_layers(const Tensors& keys, const Tensors& values, const Rows& rows) {
  const int64_t layers = keys.size();
  check(values.size() == keys.size(), "values must have as many layers as keys, ", layers, ", got ",
        values.size());
  check(rows.view.indices.stride[0] == 0 || rows.layers == layers, "indices must have ", layers,
        " layers, got ", rows.layers);
  int64_t batch = rows.view.indices.size[1], heads = kAny,
          shortest = std::numeric_limits<int64_t>::max();
  for (int64_t layer = 0; layer < layers; ++layer) {
    Floats<4> key, value;  // shapes alone, any dtype will do
    read_shape(key, "keys", keys[layer], {batch, heads, kAny, kAny});
    read_shape(value, "values", values[layer], {batch, key.size[1], key.size[2], key.size[3]});
    heads = key.size[1];
    check(rows.heads == 1 || rows.heads == heads, "indices must have ", heads, " heads, got ",
          rows.heads);
    shortest = std::min(shortest, key.size[2]);
    if (rows.layers > 1) rows.check_range(layer, key.size[2]);
  }
  if (rows.layers == 1 && layers > 0) rows.check_range(0, shortest);
}

Tensors compact_kv(Tensors keys, Tensors values, Tensor indices, OptionalTensor counts) {
  const Rows rows(indices, counts);
  check_layers(keys, values, rows);
  Tensors out;
  std::vector<cpu::RowTensor> tensors;
  for (const Tensors* side : {&keys, &values}) {
    for (size_t layer = 0; layer < side->size(); ++layer) {
      const Tensor& x = (*side)[layer];
      out.push_back(empty({x.size(0), x.size(1), rows.slots, x.size(3)}, dtype_of(x)));
      tensors.push_back(heads_of_rows(x, &out.back(), layer));
    }
  }
  cpu::compact_rows({tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, false});
  return out;
}

void compact_kv_(Tensors keys, Tensors values, Tensor indices, OptionalTensor counts) {
  const Rows rows(indices, counts);
  check_layers(keys, values, rows);
  std::vector<cpu::RowTensor> tensors;
  for (const Tensors* side : {&keys, &values}) {
    for (size_t layer = 0; layer < side->size(); ++layer) {
      tensors.push_back(heads_of_rows((*side)[layer], nullptr, layer));
    }
  }
  cpu::compact_rows_in_place(
      {tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, false});
}

Tensors compact_rows(Tensors sources, Tensor indices, OptionalTensor counts, StringHandle align) {
  const Text align_text(align);
  const Rows rows(indices, counts);
  check(rows.view.indices.stride[0] == 0 && indices.dim() == 2,
        "indices must have 2 dimensions, got ", indices.dim());
  const int64_t batch = indices.size(0);
  Tensors out;
  std::vector<cpu::RowTensor> tensors;
  for (Tensor& x : sources) {
    check(x.is_cpu() && x.dim() >= 2 && x.size(0) == batch, "tensors must be [", batch,
          ", S, ...] on the CPU");
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    rows.check_range(0, sizes[1]);
    sizes[1] = rows.slots;
    int64_t row_elements = 1;
    bool dense_rows = true;
    for (size_t i = sizes.size(); i-- > 2;) {
      dense_rows = dense_rows && (sizes[i] <= 1 || x.stride(i) == row_elements);
      row_elements *= sizes[i];
    }
    if (!dense_rows) x = torch::stable::contiguous(x);
    out.push_back(empty(sizes, dtype_of(x)));

    const int64_t bytes = element_bytes(x);
    cpu::RowTensor t;
    t.source = data_of<const char>(x);
    t.target = data_of<char>(out.back());
    t.batch = batch, t.heads = 1, t.row_bytes = row_elements * bytes;
    t.source_stride[0] = x.stride(0) * bytes, t.source_stride[2] = x.stride(1) * bytes;
    t.target_stride[0] = rows.slots * t.row_bytes, t.target_stride[2] = t.row_bytes;
    tensors.push_back(t);
  }
  const bool right = align_text.choose("align", {"left", "right"}) == 1;
  cpu::compact_rows({tensors.data(), static_cast<int64_t>(tensors.size()), rows.view, right});
  return out;
}

// ---- About the library
// -------------------------------------------------------------------------------

std::string build_info() {
  std::ostringstream json;
  json << "{\"version\": \"" VTP_VERSION "\", \"compiler\": \"" VTP_COMPILER "\", \"cpu_isa\": \""
       << cpu::isa_name() << "\", \"cuda_archs\": []}";
  return json.str();
}

}  // namespace
}  // namespace vtp

STABLE_TORCH_LIBRARY(vtp_kernels, m) {
  m.def(
      "attention_scores(Tensor query, Tensor key, Tensor candidates, Tensor? valid, Tensor? "
      "query_positions, "
      "Tensor? query_valid, Tensor? lse, float scale, str support, str head_reduce) -> Tensor");
  m.def(
      "select_topk(Tensor scores, Tensor? k_per_row, int k, Tensor? candidates, Tensor? keep, "
      "float? threshold, "
      "int capacity) -> (Tensor indices, Tensor counts)");
  m.def(
      "attention_topk(Tensor query, Tensor key, Tensor? k_per_row, int k, Tensor candidates, "
      "Tensor? valid, "
      "Tensor? query_positions, Tensor? query_valid, Tensor? lse, float scale, str support, str "
      "head_reduce, "
      "Tensor? keep, float? threshold, int capacity) -> (Tensor indices, Tensor counts, Tensor "
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
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vtp_kernels, CPU, m) {
  m.impl("attention_scores", TORCH_BOX(&vtp::attention_scores));
  m.impl("select_topk", TORCH_BOX(&vtp::select_topk));
  m.impl("attention_topk", TORCH_BOX(&vtp::attention_topk));
  m.impl("token_contribution", TORCH_BOX(&vtp::token_contribution));
  m.impl("compact_kv", TORCH_BOX(&vtp::compact_kv));
  m.impl("compact_kv_", TORCH_BOX(&vtp::compact_kv_));
  m.impl("compact_rows", TORCH_BOX(&vtp::compact_rows));
  m.impl("inflection", TORCH_BOX(&vtp::inflection));
  m.impl("cls_inflection", TORCH_BOX(&vtp::cls_inflection));
  m.impl("passive_attention", TORCH_BOX(&vtp::passive_attention));
}

STABLE_TORCH_LIBRARY_IMPL(vtp_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&vtp::build_info));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
