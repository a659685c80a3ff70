// Stand-alone run of every CPU kernel over random ragged inputs, for builds with AddressSanitizer
// and UndefinedBehaviorSanitizer. Arrays are allocated to the exact byte, so one step too far is
// caught. Results are checked elsewhere (tests/ops); here only what must hold of any result.
//
// Usage: driver <seed> <rounds>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace vtp::cpu {

// Two threads that share the range unevenly.
void parallel_for(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t split = n / 3;
  std::thread other([&] { body(0, split, context); });
  body(split, n, context);
  other.join();
}

}  // namespace vtp::cpu

namespace {

using namespace vtp;
using namespace vtp::cpu;

std::mt19937_64 generator;

int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
bool coin() { return integer(0, 1) == 1; }

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

// Memory of exactly `bytes`, kept until the round ends.
std::vector<std::unique_ptr<char[]>> memory;
template <class T>
T* allocate(int64_t size) {
  memory.emplace_back(new char[size * sizeof(T)]);
  return reinterpret_cast<T*>(memory.back().get());
}

double number() {
  switch (integer(0, 40)) {
    case 0:
      return std::numeric_limits<double>::quiet_NaN();
    case 1:
      return std::numeric_limits<double>::infinity();
    case 2:
      return -std::numeric_limits<double>::infinity();
    case 3:
      return -0.0;
    case 4:
      return 1e-42;
    default:
      return std::normal_distribution<double>()(generator);
  }
}

// Rows may be padded apart; the last one ends where the memory does.
template <int Rank>
Floats<Rank> floats(DType dtype, const int64_t (&size)[Rank]) {
  Floats<Rank> f;
  f.dtype = dtype;
  int64_t stride = 1, last = 0;
  bool empty = false;
  for (int i = Rank - 1; i >= 0; --i) {
    f.size[i] = size[i];
    f.stride[i] = i == Rank - 1 ? 1 : stride;
    stride = std::max<int64_t>(1, size[i]) * f.stride[i] + (i == Rank - 1 ? integer(0, 3) : 0);
    last += (size[i] - 1) * f.stride[i];
    empty |= size[i] == 0;
  }
  const int64_t elements = empty ? 0 : last + 1;
  if (dtype == DType::f64) {
    auto* data = allocate<double>(elements);
    std::generate_n(data, elements, number);
    f.data = data;
  } else if (dtype == DType::f32) {
    auto* data = allocate<float>(elements);
    std::generate_n(data, elements, [] { return static_cast<float>(number()); });
    f.data = data;
  } else {  // any 16 bits are a number of sorts
    auto* data = allocate<uint16_t>(elements);
    std::generate_n(data, elements, [] { return static_cast<uint16_t>(generator()); });
    f.data = data;
  }
  return f;
}

Mask mask(int64_t rows, int64_t columns) {
  auto* data = allocate<MaskByte>(rows * columns);
  const int64_t ones = integer(0, 10);
  std::generate_n(data, rows * columns, [&] {
    const int64_t truth = coin() ? 1 : integer(1, 255);
    return MaskByte{static_cast<uint8_t>(integer(1, 10) <= ones ? truth : 0)};
  });
  Mask m;
  m.data = data;
  m.size[0] = rows, m.size[1] = columns, m.stride[0] = columns, m.stride[1] = 1;
  return m;
}

Mask maybe_mask(int64_t rows, int64_t columns) { return coin() ? mask(rows, columns) : Mask{}; }
DType any_dtype() { return static_cast<DType>(integer(0, 3)); }
char* scores(DType dtype, int64_t size) {
  return allocate<char>(size * (dtype == DType::f64 ? 8 : 4));
}
int64_t any_length() { return coin() ? integer(0, 20) : integer(0, 200); }
int64_t any_dim() { return coin() ? 16 * integer(1, 8) : integer(1, 70); }

void check_selection(const int64_t* indices, const int32_t* counts, int64_t batch, int64_t capacity,
                     int64_t length) {
  for (int64_t b = 0; b < batch; ++b) {
    int64_t last = -1;
    require(counts[b] >= 0 && counts[b] <= std::min(capacity, length), "count out of range");
    for (int64_t i = 0; i < capacity; ++i) {
      const int64_t index = indices[b * capacity + i];
      require(i < counts[b] ? index > last && index < length : index == -1,
              "indices not ascending in range");
      last = index;
    }
  }
}

void run_attention_scores() {
  const int64_t batch = integer(0, 3), kv_heads = integer(1, 3), heads = kv_heads * integer(1, 9);
  const int64_t rows = coin() ? integer(0, 3) : integer(0, 150), length = any_length(),
                dim = any_dim();
  AttentionScores a;
  a.query = floats(any_dtype(), {batch, heads, rows, dim});
  a.key = floats(a.query.dtype, {batch, kv_heads, length, dim});
  a.candidates = mask(batch, length);
  a.valid = maybe_mask(batch, length);
  a.query_valid = maybe_mask(batch, rows);
  if (coin()) {
    auto* positions = allocate<int64_t>(batch * rows);
    std::generate_n(positions, batch * rows, [&] { return integer(-5, length + 5); });
    a.query_positions.data = positions;
    a.query_positions.stride[0] = rows, a.query_positions.stride[1] = 1;
  }
  if (coin()) {
    a.lse = floats(a.query.dtype == DType::f64 ? DType::f64 : DType::f32, {batch, heads, rows});
  } else {
    a.candidates_only = coin();
  }
  a.head_reduce = static_cast<HeadReduce>(integer(0, 2));
  a.scores = scores(a.query.dtype, batch * length);
  attention_scores(a);
}

void run_token_contribution() {
  const int64_t batch = integer(0, 3), kv_heads = integer(1, 3), heads = kv_heads * integer(1, 5);
  const int64_t length = any_length(), dim = any_dim();
  TokenContribution a;
  a.query = floats(any_dtype(), {batch, heads, dim});
  a.key = floats(a.query.dtype, {batch, kv_heads, length, dim});
  a.value = floats(a.query.dtype, {batch, kv_heads, length, dim});
  a.candidates = mask(batch, length);
  a.valid = maybe_mask(batch, length);
  a.cosine = scores(a.query.dtype, batch * length);
  a.norm = scores(a.query.dtype, batch * length);
  token_contribution(a);
}

void run_passive_attention() {
  const int64_t batch = integer(0, 2), kv_heads = integer(1, 2), heads = kv_heads * integer(1, 3);
  const int64_t length = any_length(), dim = any_dim();
  PassiveAttention a;
  a.query = floats(any_dtype(), {batch, heads, length, dim});
  a.key = floats(a.query.dtype, {batch, kv_heads, length, dim});
  a.value = floats(a.query.dtype, {batch, kv_heads, length, dim});
  a.visual = mask(batch, length);
  a.valid = maybe_mask(batch, length);
  a.merge = coin();
  a.visual_rows = static_cast<VisualRows>(integer(0, 2));
  a.renormalize = coin();
  const int64_t bytes = a.query.dtype == DType::f64 ? 8 : a.query.dtype == DType::f32 ? 4 : 2;
  a.output = allocate<char>(batch * heads * length * dim * bytes);
  passive_attention(a);
}

void run_select_topk() {
  const int64_t batch = integer(0, 4), length = coin() ? any_length() : integer(0, 3000);
  SelectTopk a;
  a.scores = floats(any_dtype(), {batch, length});
  auto* k = allocate<int64_t>(batch);
  std::generate_n(k, batch, [&] { return integer(-2, length + 3); });
  a.k_per_row = {k, true, {1}};
  a.candidates = maybe_mask(batch, length);
  a.keep = maybe_mask(batch, length);
  a.has_threshold = coin();
  a.threshold = number();
  a.capacity = integer(0, length + 3);
  a.indices = allocate<int64_t>(batch * a.capacity);
  a.counts = allocate<int32_t>(batch);
  select_topk(a);
  check_selection(a.indices, a.counts, batch, a.capacity, length);
}

void run_select_diverse() {
  const int64_t batch = integer(0, 4), length = any_length();
  SelectDiverse a;
  const bool lazy = coin();  // few of many rows, with as many channels as that asks for
  const int64_t channels = coin() ? integer(1, 5) : integer(1, 300);
  a.features = floats(any_dtype(), {batch, length, lazy ? 16 * integer(16, 20) : channels});
  auto* k = allocate<int64_t>(batch);
  std::generate_n(k, batch, [&] { return integer(-2, lazy ? length / 5 : length + 3); });
  a.k_per_row = {k, true, {1}};
  a.rule = coin() ? Diversity::maxmin : Diversity::dpp;
  const DType wide = a.features.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (coin()) a.relevance = floats(wide, {batch, length});
  a.candidates = maybe_mask(batch, length);
  a.keep = maybe_mask(batch, length);
  a.first = coin() && length > 0 ? integer(0, length - 1) : -1;
  a.capacity = integer(0, length + 3);
  a.indices = allocate<int64_t>(batch * a.capacity);
  a.counts = allocate<int32_t>(batch);
  select_diverse(a);
  check_selection(a.indices, a.counts, batch, a.capacity, length);
}

void run_inflection() {
  const int64_t batch = integer(0, 4), length = coin() ? any_length() : integer(0, 3000),
                channels = integer(1, 70);
  CosineSimilarity c;
  c.features = floats(any_dtype(), {batch, length, channels});
  c.cls = floats(c.features.dtype, {batch, channels});
  c.similarity = scores(c.features.dtype, batch * length);
  cosine_similarity(c);

  Inflection a;
  a.curve = floats(any_dtype(), {batch, length});
  if (coin()) {
    a.curve = {c.similarity,
               c.features.dtype == DType::f64 ? DType::f64 : DType::f32,
               {batch, length},
               {length, 1}};
  }
  a.rule = static_cast<Rule>(integer(0, 3));
  a.min_keep = integer(0, 5);
  a.capacity = integer(0, length);
  a.clip_quantile = coin() ? 1.0 : integer(1, 1000) / 1000.0;
  a.sensitivity = static_cast<double>(integer(0, 3));
  a.mass = integer(1, 100) / 100.0;
  a.indices = allocate<int64_t>(batch * a.capacity);
  a.counts = allocate<int32_t>(batch);
  inflection(a);
  check_selection(a.indices, a.counts, batch, a.capacity, length);
}

void run_compact_rows() {
  const int64_t batch = integer(0, 3), heads = integer(1, 3), length = any_length();
  const int64_t slots = integer(0, length),
                row_bytes = coin() ? int64_t{1} << integer(0, 3) : integer(1, 600);
  const int64_t chains = batch * heads;
  auto* indices = allocate<int64_t>(chains * slots);
  auto* counts = allocate<int64_t>(chains);
  std::vector<int64_t> all(length);
  for (int64_t i = 0; i < length; ++i) all[i] = i;
  for (int64_t chain = 0; chain < chains; ++chain) {
    std::sample(all.begin(), all.end(), indices + chain * slots, slots, generator);
    counts[chain] = integer(0, slots);
    std::fill(indices + chain * slots + counts[chain], indices + (chain + 1) * slots, int64_t{-1});
  }
  CompactRows a;
  a.rows.indices = {indices, {1, batch, heads, slots}, {0, heads * slots, slots, 1}};
  a.rows.counts = {counts, true, {0, heads, 1}};

  auto* source = allocate<char>(chains * length * row_bytes);
  std::generate_n(source, chains * length * row_bytes,
                  [] { return static_cast<char>(generator()); });
  RowTensor t;
  t.source = source;
  t.target = allocate<char>(chains * slots * row_bytes);
  t.batch = batch, t.heads = heads, t.row_bytes = row_bytes;
  const int64_t from[] = {heads * length * row_bytes, length * row_bytes, row_bytes};
  const int64_t to[] = {heads * slots * row_bytes, slots * row_bytes, row_bytes};
  std::copy_n(from, 3, t.source_stride);
  std::copy_n(to, 3, t.target_stride);
  a.tensors = &t;
  a.tensor_count = 1;
  a.align_right = coin();
  compact_rows(a);
  a.align_right = false;
  compact_rows(a);

  RowTensor in_place = t;
  in_place.target = source;
  std::copy_n(from, 3, in_place.target_stride);
  a.tensors = &in_place;
  compact_rows_in_place(a);
  for (int64_t chain = 0; chain < chains; ++chain) {
    require(std::equal(t.target + chain * slots * row_bytes,
                       t.target + (chain * slots + counts[chain]) * row_bytes,
                       source + chain * length * row_bytes),
            "in place differs from out of place");
  }
}

// Different rows of [0, length) in any order, some of them padding.
View<const int64_t, 2> some_targets(int64_t batch, int64_t length, int64_t count) {
  auto* targets = allocate<int64_t>(batch * count);
  std::vector<int64_t> all(std::max(length, count), -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < length; ++i) all[i] = i;
    std::shuffle(all.begin(), all.end(), generator);
    for (int64_t t = 0; t < count; ++t) targets[b * count + t] = integer(0, 9) ? all[t] : -1;
  }
  return {targets, {batch, count}, {count, 1}};
}

void run_merging() {
  const int64_t batch = integer(0, 3), length = any_length(), count = integer(0, 90);
  AssignRows a;
  a.keys = floats(any_dtype(), {batch, length, coin() ? integer(0, 3) : integer(1, 600)});
  a.targets = some_targets(batch, length, count);
  a.candidates = maybe_mask(batch, length);
  a.assignment = allocate<int64_t>(batch * length);
  assign_rows(a);
  for (int64_t i = 0; i < batch * length; ++i) {
    require(a.assignment[i] >= -1 && a.assignment[i] < count, "no position of a target");
  }

  const int64_t channels = coin() ? integer(0, 3) : integer(1, 5000);
  MergeRows m;
  m.features = floats(any_dtype(), {batch, length, channels});
  m.assignment = {a.assignment, {batch, length}, {length, 1}};
  m.targets = a.targets;
  m.mode = static_cast<MergeMode>(integer(0, 2));
  if (m.mode == MergeMode::weighted) {
    m.weights = floats(m.features.dtype == DType::f64 ? DType::f64 : DType::f32, {batch, length});
  }
  const DType dtype = m.features.dtype;
  m.merged = allocate<char>(batch * count * channels *
                            (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2));
  merge_rows(m);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  generator.seed(std::strtoull(argv[1], nullptr, 10));
  for (int64_t round = std::atoll(argv[2]); round > 0; --round) {
    run_attention_scores();
    run_token_contribution();
    run_passive_attention();
    run_select_topk();
    run_select_diverse();
    run_inflection();
    run_compact_rows();
    run_merging();
    memory.clear();
  }
  std::printf("%s\n", isa_name());
}
