// Causal attention with visual tokens as passive sinks, without the work on what has no weight. A
// tile of query rows holds rows of one kind, text or visual, and runs through two lists of keys:
// first the `silent` ones, which only stand in the softmax denominator (no value is read, no second
// product taken), then the `weighted` ones, which reach the output.
#include <algorithm>
#include <type_traits>

#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/flash_tile.cuh"

namespace vtp::cuda {
namespace {

// Positions of the tokens of a batch row, each list ascending. The first four hold valid tokens.
enum List : int {
  kText,
  kVisual,
  kAll,
  kTextAndFirst,  // text and the first visual token
  kBlank,         // rows that output 0: padding, and visual rows that are skipped
  kLists,
  kNone = kLists,
};

// How many valid tokens there are up to a position, itself included.
struct Until {
  int text, visual;

  VTP_DEVICE int of(List list) const {
    if (list == kText) return text;
    if (list == kVisual) return visual;
    if (list == kAll) return text + visual;
    return list == kTextAndFirst ? text + (visual > 0) : 0;
  }
};

struct Tokens {
  int* lists;    // [B, kLists, S]
  Until* until;  // [B, S]
  int length;    // S
  bool skip_visual;

  VTP_DEVICE int* list(int64_t batch, List list) const {
    return lists + (batch * kLists + list) * length;
  }
};

// The keys of rows of one kind.
struct KeyLists {
  List weighted, silent;
  bool merge;  // the silent mass goes to the first visual key
};

KeyLists keys_of_text(const PassiveAttention& a) {
  if (!a.renormalize) return {kText, kVisual, a.merge};
  return {a.merge ? kTextAndFirst : kText, kNone, false};
}

KeyLists keys_of_visual(const PassiveAttention& a) {
  if (a.visual_rows == VisualRows::causal) return {kAll, kNone, false};
  return {kText, a.renormalize ? kNone : kVisual, false};
}

// --- lists ----------------------------------------------------------------------------------------

constexpr int kListThreads = 256, kPerThread = 8, kListStep = kListThreads * kPerThread;

// kPerThread bytes of a mask from `begin` on, 0 past `count`: one load where they lie that way, else
// loads that do not wait for each other.
VTP_DEVICE uint64_t load_mask(const Mask& mask, int64_t batch, int begin, int count) {
  static_assert(kPerThread == sizeof(uint64_t));
  const MaskByte* first = mask.at(batch, begin);
  if (count == kPerThread && mask.stride[1] == 1 &&
      reinterpret_cast<uintptr_t>(first) % sizeof(uint64_t) == 0) {
    return *reinterpret_cast<const uint64_t*>(first);
  }
  uint64_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint8_t byte = i < count ? first[i * mask.stride[1]].byte : 0;
    bytes |= uint64_t{byte} << 8 * i;
  }
  return bytes;
}

// A bit for every byte that is not 0.
VTP_DEVICE unsigned bits_of_mask(uint64_t bytes) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    bits |= static_cast<unsigned>((bytes >> 8 * i & 0xff) != 0) << i;
  }
  return bits;
}

// Lists position s of a batch row, of which `until` counts what lies before.
VTP_DEVICE void list_token(const Tokens& tokens, int64_t batch, int s, bool is_text, bool is_visual,
                           Until& until) {
  const int blank = s - until.text - (tokens.skip_visual ? 0 : until.visual);
  if (!is_text && (!is_visual || tokens.skip_visual)) tokens.list(batch, kBlank)[blank] = s;
  if (is_text || (is_visual && until.visual == 0)) {
    tokens.list(batch, kTextAndFirst)[until.of(kTextAndFirst)] = s;
  }
  if (is_text || is_visual) tokens.list(batch, kAll)[until.of(kAll)] = s;
  if (is_text) tokens.list(batch, kText)[until.text++] = s;
  if (is_visual) tokens.list(batch, kVisual)[until.visual++] = s;
  tokens.until[batch * tokens.length + s] = until;
}

// Lists kListStep positions from `first` on and adds them to `until`, in every thread.
VTP_DEVICE void list_step(const Tokens& tokens, const Mask& visual, const Mask& valid, int first,
                          Until& until, BlockScratch<int>& scratch) {
  const int64_t batch = blockIdx.x;
  const int begin = first + static_cast<int>(threadIdx.x) * kPerThread;
  const int count = max(0, min(kPerThread, tokens.length - begin));
  const uint64_t visual_bytes = load_mask(visual, batch, begin, count);
  const uint64_t valid_bytes = valid ? load_mask(valid, batch, begin, count) : ~uint64_t{0};
  const unsigned in_row = (1u << count) - 1, valid_bits = bits_of_mask(valid_bytes) & in_row;
  const unsigned visual_bits = bits_of_mask(visual_bytes) & valid_bits;
  const unsigned text_bits = valid_bits & ~visual_bits;
  int total;  // text in the lower half, visual in the upper one
  const int before = block_exclusive_sum<kListThreads>(
      __popc(visual_bits) << 16 | __popc(text_bits), &total, scratch);
  Until own = {until.text + (before & 0xffff), until.visual + (before >> 16)};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    list_token(tokens, batch, begin + i, text_bits >> i & 1, visual_bits >> i & 1, own);
  }
  until = {until.text + (total & 0xffff), until.visual + (total >> 16)};
}

__global__ void __launch_bounds__(kListThreads)
    list_tokens_kernel(Tokens tokens, Mask visual, Mask valid) {
  VTP_SHARED(BlockScratch<int>, scratch);
  release_next_kernel();
  Until until = {};
  for (int first = 0; first < tokens.length; first += kListStep) {
    list_step(tokens, visual, valid, first, until, scratch);
  }
}

// --- attention ------------------------------------------------------------------------------------

template <class T>
struct Problem {
  View<const T, 4> query, key, value;
  T* output;
  bool aligned;  // all rows of all four, to 16 bytes
  Tokens tokens;
  KeyLists of_text, of_visual;
  float factor;  // on products of queries and keys: logits in base 2
};

template <class T>
VTP_DEVICE T* output_row(const Problem<T>& p, int position) {
  const int64_t batch_and_head = blockIdx.x;
  return p.output + (batch_and_head * p.query.size[2] + position) * p.query.size[3];
}

// Shared memory of a multiprocessor. It says how many blocks run side by side, and so how many
// registers each may take.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
constexpr int kMultiprocessorShared = 64 * 1024;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int kMultiprocessorShared = 100 * 1024;
#else
constexpr int kMultiprocessorShared = 164 * 1024;
#endif

// Tile sizes for up to Columns head dims. With the queries and two tiles of keys or values a block
// takes 64 KB of shared memory at most, all that sm_75 has.
template <class T, int Columns>
struct Tiling {
  static constexpr int kRowBytes = Columns * static_cast<int>(sizeof(T));
  static constexpr int kRows = kRowBytes > 512 ? 32 : 64;
  static constexpr int kKeys = kRowBytes < 256 ? 64 : 16 * 1024 / kRowBytes;
  static constexpr int kThreads = kRows / kWarpRows * kWarp;
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kRowBytes;
  static constexpr int kFit = kMultiprocessorShared / (kSharedBytes + 1024);  // 1 KB is taken by CUDA
  static constexpr int kBlocks = kFit < 1 ? 1 : kFit > 3 ? 3 : kFit;
};

// Rows first ... first + count of a list.
struct RowTile {
  List list;
  int first, count;
};

// Tile `rank` of a batch row. Text rows and visual rows that lie late have most keys and go first.
template <int Rows>
VTP_DEVICE RowTile find_tile(const Tokens& tokens, Until total, int rank) {
  const int visual_rows = tokens.skip_visual ? 0 : total.visual;
  const int blank_rows = tokens.length - total.text - visual_rows;
  const auto tile = [](List list, int index, int rows) {
    return RowTile{list, index * Rows, min(Rows, rows - index * Rows)};
  };
  const auto tiles = [](int rows) { return (rows + Rows - 1) / Rows; };
  if (rank < tiles(total.text)) return tile(kText, tiles(total.text) - 1 - rank, total.text);
  rank -= tiles(total.text);
  if (rank < tiles(visual_rows)) return tile(kVisual, tiles(visual_rows) - 1 - rank, visual_rows);
  rank -= tiles(visual_rows);
  if (rank < tiles(blank_rows)) return tile(kBlank, rank, blank_rows);
  return {kNone, 0, 0};
}

// A list of keys as a lane sees it. Lists ascend, so a row attends to the first few keys: how many,
// says which, and no position is compared.
struct Keys {
  List list;
  int count;        // attended by the tile's last row
  int attended[2];  // by the lane's rows; 0 in a warp without rows
};

// One tile of rows of one head. Tiles of keys and values take turns in two buffers: while one is
// worked on, the next is under way.
template <class T, int Columns>
class Attend {
 public:
  using Tile = Tiling<T, Columns>;
  static constexpr int kKeys = Tile::kKeys;

  VTP_DEVICE Attend(const Problem<T>& problem, int batch, int head, RowTile rows, T* shared)
      : p_(problem),
        batch_(batch),
        head_(head),
        kv_head_(head / static_cast<int>(p_.query.size[1] / p_.key.size[1])),
        dim_(static_cast<int>(p_.query.size[3])),
        rows_(rows),
        query_{shared} {
    const KeyLists lists = rows.list == kText ? p_.of_text : p_.of_visual;
    weighted_ = keys_of(lists.weighted);
    silent_ = keys_of(lists.silent);
    merge_ = lists.merge && silent_.count > 0;
  }

  VTP_DEVICE void run() {
    Step step = start({false, 0, false});
    if (ongoing(step)) {
      gather_rows<Tile::kRows, Tile::kThreads>(query_, row_source(), 0);
      request(step);
    }
    while (ongoing(step)) {
      receive();
      const Step next = after(step);
      if (ongoing(next)) request(next);
      if (__any_sync(kAllLanes, step.first < keys_of(step).attended[1])) {
        if (step.adds) {
          add_values<kKeys>(sums_, logits_, tile_rows(received_), dim_);
        } else {
          weigh(step);
        }
      }
      step = next;
    }
    finish();
  }

 private:
  using SharedTile = SharedRows<T, Columns>;

  // The lane's rows, within the tile of rows.
  VTP_DEVICE static int row_of(int h) { return warp_id() * kWarpRows + lane_id() / 4 + 8 * h; }

  // The work on one tile: keys first ... first + kKeys of one of the lists are given weights, or the
  // weighted ones' values are added up.
  struct Step {
    bool weighted;
    int first;
    bool adds;
  };

  VTP_DEVICE Keys keys_of(Step step) const { return step.weighted ? weighted_ : silent_; }

  VTP_DEVICE bool ongoing(Step step) const { return step.first < keys_of(step).count; }

  // Leaves the silent list behind its end.
  VTP_DEVICE Step start(Step step) const {
    return !step.weighted && !ongoing(step) ? Step{true, 0, false} : step;
  }

  VTP_DEVICE Step after(Step step) const {
    if (step.weighted && !step.adds) return {true, step.first, true};
    return start({step.weighted, step.first + kKeys, false});
  }

  VTP_DEVICE const int* row_positions() const {
    return p_.tokens.list(batch_, rows_.list) + rows_.first;
  }

  VTP_DEVICE Until until(int row) const {
    return p_.tokens.until[static_cast<int64_t>(batch_) * p_.tokens.length + row_positions()[row]];
  }

  VTP_DEVICE Keys keys_of(List list) const {
    if (list == kNone) return {kNone, 0, {}};
    const int last = rows_.count - 1;
    Keys keys = {list, until(last).of(list), {}};
    if (warp_id() * kWarpRows > last) return keys;
#pragma unroll
    for (int h = 0; h < 2; ++h) keys.attended[h] = until(min(row_of(h), last)).of(list);
    return keys;
  }

  VTP_DEVICE Rows<T> row_source() const {
    return {p_.query.at(batch_, head_), p_.query.stride[2], dim_, p_.aligned, row_positions(),
            rows_.count};
  }

  VTP_DEVICE SharedTile tile_rows(int buffer) const {
    return {query_.base + (Tile::kRows + buffer * kKeys) * Columns};
  }

  VTP_DEVICE void request(Step step) {
    const View<const T, 4>& tensor = step.adds ? p_.value : p_.key;
    const Keys keys = keys_of(step);
    const Rows<T> rows = {tensor.at(batch_, kv_head_), tensor.stride[2], dim_,
                          p_.aligned,                  p_.tokens.list(batch_, keys.list), keys.count};
    gather_rows<kKeys, Tile::kThreads>(tile_rows(1 - received_), rows, step.first);
    commit_copies();
  }

  // Takes the tile requested last and frees the other buffer, which all have left.
  VTP_DEVICE void receive() {
    wait_copies<0>();
    __syncthreads();
    received_ = 1 - received_;
  }

  VTP_DEVICE void weigh(Step step) {
    const Keys keys = keys_of(step);
    multiply_keys<kKeys>(logits_, query_, warp_id() * kWarpRows, tile_rows(received_), dim_);
    const bool all_attend = __all_sync(kAllLanes, step.first + kKeys <= keys.attended[0]);
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = step.first + 8 * j + 2 * (lane_id() % 4) + i % 2;
        const bool attended = all_attend || key < keys.attended[i / 2];
        logits_[j][i] = attended ? logits_[j][i] * p_.factor : -INFINITY;
      }
    }
    float keep[2], sum[2];
    maximum_.weigh(logits_, keep, sum);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      silent_sum_[h] = silent_sum_[h] * keep[h] + (step.weighted ? 0.0f : sum[h]);
      weighted_sum_[h] = weighted_sum_[h] * keep[h] + (step.weighted ? sum[h] : 0.0f);
    }
    if (!step.weighted) return;  // nothing has been added up
#pragma unroll
    for (int j = 0; j < Columns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_[j][i] *= keep[i / 2];
    }
  }

  // Weighs the sums and writes them by way of the warp's own rows of queries, no longer needed.
  VTP_DEVICE void finish() {
    const T* first_value = nullptr;
    if (merge_) first_value = p_.value.at(batch_, kv_head_, p_.tokens.list(batch_, silent_.list)[0]);
    float share[2], moved[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float silent = RowMaximum::total(silent_sum_[h]);
      const float sum = RowMaximum::total(weighted_sum_[h]) + silent;
      // Who attends to logits of -inf alone gets NaN, as softmax has it; who attends to nothing, 0.
      const bool undefined = weighted_.attended[h] + silent_.attended[h] > 0;
      share[h] = sum == 0.0f ? (undefined ? __uint_as_float(0x7fc00000u) : 0.0f) : 1.0f / sum;
      moved[h] = merge_ && silent_.attended[h] > 0 ? silent * share[h] : 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Columns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = column_of<T>(j, i);
        if (column >= dim_) continue;
        const float value = merge_ ? to_float(first_value[column]) : 0.0f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float merged = moved[h] == 0.0f ? 0.0f : moved[h] * value;
          *query_.at(row_of(h), column) = from_float<T>(fmaf(sums_[j][2 * h + i], share[h], merged));
        }
      }
    }
    __syncwarp();
    write_rows();
  }

  VTP_DEVICE void write_rows() const {
    constexpr int kChunks = SharedTile::kChunks, kSize = kVectorSize<T>;
    for (int index = lane_id(); index < kWarpRows * kChunks; index += kWarp) {
      const int row = warp_id() * kWarpRows + index / kChunks, column = index % kChunks * kSize;
      if (row >= rows_.count || column >= dim_) continue;
      T* target = output_row(p_, row_positions()[row]) + column;
      const T* source = query_.chunk(row, index % kChunks);
      if (p_.aligned) {
        *reinterpret_cast<int4*>(target) = *reinterpret_cast<const int4*>(source);
      } else {
        for (int i = 0; i < min(kSize, dim_ - column); ++i) target[i] = source[i];
      }
    }
  }

  const Problem<T>& p_;
  const int batch_, head_, kv_head_, dim_;
  const RowTile rows_;
  const SharedTile query_;
  Keys weighted_, silent_;
  bool merge_;
  int received_ = 1;  // the buffer to work on
  float logits_[kKeys / 8][4];
  float sums_[Columns / 8][4] = {};
  float silent_sum_[2] = {}, weighted_sum_[2] = {};
  RowMaximum maximum_;
};

template <class T>
VTP_DEVICE void clear_rows(const Problem<T>& p, int batch, RowTile rows) {
  const int* positions = p.tokens.list(batch, rows.list) + rows.first;
  const int dim = static_cast<int>(p.query.size[3]);
  for (int row = warp_id(); row < rows.count; row += static_cast<int>(blockDim.x) / kWarp) {
    T* target = output_row(p, positions[row]);
    for (int column = lane_id(); column < dim; column += kWarp) {
      target[column] = from_float<T>(0.0f);
    }
  }
}

template <class T, int Columns>
__global__ void __launch_bounds__(Tiling<T, Columns>::kThreads, Tiling<T, Columns>::kBlocks)
    attend_kernel(Problem<T> p) {
  VTP_DYNAMIC_SHARED(shared);
  const int heads = static_cast<int>(p.query.size[1]);
  const int batch = static_cast<int>(blockIdx.x) / heads;
  const int head = static_cast<int>(blockIdx.x) % heads;
  await_earlier_kernels();
  const Until total = p.tokens.until[(batch + int64_t{1}) * p.tokens.length - 1];
  const RowTile rows =
      find_tile<Tiling<T, Columns>::kRows>(p.tokens, total, static_cast<int>(blockIdx.y));
  if (rows.count == 0) return;
  if (rows.list == kBlank) {
    clear_rows(p, batch, rows);
  } else {
    Attend<T, Columns>(p, batch, head, rows, reinterpret_cast<T*>(shared)).run();
  }
}

// --- launches -------------------------------------------------------------------------------------

Tokens token_lists(const PassiveAttention& a, Pieces& pieces) {
  const int64_t batch = a.query.size[0], length = a.query.size[2];
  Tokens tokens;
  tokens.lists = pieces.take<int>(batch * kLists * length);
  tokens.until = pieces.take<Until>(batch * length);
  tokens.length = static_cast<int>(length);
  tokens.skip_visual = a.visual_rows == VisualRows::skip;
  return tokens;
}

template <class T, int Columns>
void attend(const Problem<T>& problem, OpStream& stream) {
  using Tile = Tiling<T, Columns>;
  const int64_t batch_heads = problem.query.size[0] * problem.query.size[1];
  // Rows of three kinds, each of which may end in a partial tile.
  const int64_t tiles = problem.tokens.length / Tile::kRows + 3;
  launch("passive_attention", attend_kernel<T, Columns>,
         dim3(static_cast<unsigned>(batch_heads), static_cast<unsigned>(tiles)),
         dim3(Tile::kThreads), static_cast<size_t>(Tile::kSharedBytes), stream, problem);
}

template <class T>
void attend_all(const PassiveAttention& a, const Tokens& tokens, OpStream& stream) {
  const int64_t dim = a.query.size[3];
  Problem<T> problem;
  problem.query = view_as<const T>(a.query);
  problem.key = view_as<const T>(a.key);
  problem.value = view_as<const T>(a.value);
  problem.output = static_cast<T*>(a.output);
  problem.aligned = rows_are_aligned(a.query) && rows_are_aligned(a.key) &&
                    rows_are_aligned(a.value) &&
                    reinterpret_cast<uintptr_t>(a.output) % kVectorBytes == 0;
  problem.tokens = tokens;
  problem.of_text = keys_of_text(a);
  problem.of_visual = keys_of_visual(a);
  problem.factor = static_cast<float>(a.scale * 1.4426950408889634);
  if (dim <= 64) {
    attend<T, 64>(problem, stream);
  } else if (dim <= 128) {
    attend<T, 128>(problem, stream);
  } else {
    attend<T, 256>(problem, stream);
  }
}

}  // namespace

size_t passive_attention_workspace(const PassiveAttention& a) {
  Pieces pieces(nullptr);
  token_lists(a, pieces);
  return pieces.bytes();
}

void passive_attention(const PassiveAttention& a, void* workspace, Stream stream) {
  const int64_t batch = a.query.size[0], length = a.query.size[2];
  if (batch == 0 || a.query.size[1] == 0 || length == 0) return;
  Pieces pieces(workspace);
  const Tokens tokens = token_lists(a, pieces);
  OpStream ours(stream);
  launch("passive_attention lists", list_tokens_kernel, dim3(static_cast<unsigned>(batch)),
         dim3(kListThreads), 0, ours, tokens, a.visual, a.valid);
  with_type(a.query.dtype, [&](auto type) { attend_all<decltype(type)>(a, tokens, ours); });
}

}  // namespace vtp::cuda
