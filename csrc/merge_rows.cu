// Every target row merged with its group, in two launches: the rows are listed by group, ascending,
// then every group is added up in that order.
//
// The list is a counting sort, stable and without atomics: every warp of the one block of a sequence
// goes through a stretch of rows, 32 at a time, and lanes of the same group find their rank among
// each other by votes. Counters lie in shared memory, those of more than 1536 targets in the
// workspace. The sums have one owner each, a thread for 16 bytes of a target: every row is read
// once, 16 bytes a lane, eight rows of a group under way.
//
// What must be moved: B N C s bytes of rows that have a group, B T C s of merged ones, 8 B N of
// positions; the lists, 8 B N bytes twice, are small beside them. At LLaVA-1.5 (N = 576, T = 30,
// C = 4096, 16 bits) 5.0 MB, 1.2 us: two launches of some 3 us each are what it should take, the
// list's two walks of three steps and one dependent load of rows a group. At N = 2880, T = 320 the
// rows are 24 MB, 6 us. One group of all rows is the worst there is: 1 KB of a row a block, 20 bytes
// a cycle. Expected, not measured.
#include <cstring>
#include <type_traits>

#include "cuda_ops.h"
#include "vtp/dependent_launch.cuh"
#include "vtp/vector.cuh"
#include "vtp/warp.cuh"

namespace vtp::cuda {
namespace {

// --- the list ---------------------------------------------------------------------------------

constexpr int kListThreads = 256;
constexpr int kListWarps = kListThreads / kWarp;
constexpr int64_t kMostInShared = 1536;  // targets: their counters take 48 KB

struct Lists {
  int* group;     // [B, N]: the position of a row's target; T: it has none
  int* member;    // [B, N]: the rows by group, ascending
  int* start;     // [B, T + 1]: where the members of a group begin, and those of the last end
  int* counters;  // [B, kListWarps, T], if they do not fit into shared memory
};

VTP_DEVICE bool is_within(int64_t x, int64_t size) { return x >= 0 && x < size; }

// The group of every row: the one it is assigned to, but a target's own for the target.
VTP_DEVICE void find_groups(const MergeRows& a, int64_t b, int* group) {
  const int64_t length = a.features.size[1], targets = a.targets.size[1];
  for (int64_t i = threadIdx.x; i < length; i += kListThreads) {
    const int64_t assigned = *a.assignment.at(b, i);
    group[i] = static_cast<int>(is_within(assigned, targets) ? assigned : targets);
  }
  __syncthreads();
  for (int64_t t = threadIdx.x; t < targets; t += kListThreads) {
    const int64_t row = *a.targets.at(b, t);
    if (is_within(row, length)) group[row] = static_cast<int>(t);
  }
  __syncthreads();
}

// The lanes of the warp whose numbers, of so many bits, are the same.
VTP_DEVICE unsigned same_as_mine(int number, int bits) {
  unsigned same = kAllLanes;
  for (int bit = 0; bit < bits; ++bit) {
    const bool is_set = number >> bit & 1;
    const unsigned set = __ballot_sync(kAllLanes, is_set);
    same &= is_set ? set : ~set;
  }
  return same;
}

// Goes through the warp's stretch of rows, 32 at a time in order, and counts up counters[group] for
// each that has a group; calls f(row, what the counter was before it).
template <class F>
VTP_DEVICE void count_rows(const int* group, int length, int targets, int* counters, const F& f) {
  const int bits = 32 - __clz(targets);
  const int steps = static_cast<int>(divide_up(length, kListThreads));
  const int first = warp_id() * steps * kWarp;
  const unsigned before = (1u << lane_id()) - 1;
  for (int step = 0; step < steps; ++step) {
    const int row = first + step * kWarp + lane_id();
    const int own = row < length ? group[row] : targets;
    const unsigned same = same_as_mine(own, bits);
    const int count = own < targets ? counters[own] : 0;
    __syncwarp();
    if (own < targets) {
      f(row, count + __popc(same & before));
      if ((same & before) == 0) counters[own] = count + __popc(same);
    }
    __syncwarp();
  }
}

// Turns counts by warp and target into where the warp's rows of the target go.
VTP_DEVICE void place_groups(int* counters, int targets, int* start, BlockScratch<int>& scratch) {
  int listed = 0;
  for (int first = 0; first < targets; first += kListThreads) {
    const int t = first + static_cast<int>(threadIdx.x);
    int count = 0, total = 0;
    for (int warp = 0; warp < kListWarps && t < targets; ++warp) {
      count += counters[warp * targets + t];
    }
    int place = listed + block_exclusive_sum<kListThreads>(count, &total, scratch);
    listed += total;
    if (t >= targets) continue;
    start[t] = place;
    for (int warp = 0; warp < kListWarps; ++warp) {
      const int of_warp = counters[warp * targets + t];
      counters[warp * targets + t] = place;
      place += of_warp;
    }
  }
  if (threadIdx.x == 0) start[targets] = listed;
}

__global__ void __launch_bounds__(kListThreads, 1)
    list_members(MergeRows a, Lists lists) {
  VTP_DYNAMIC_SHARED(shared);
  VTP_SHARED(BlockScratch<int>, scratch);
  release_next_kernel();
  const int64_t b = blockIdx.x;
  const int length = static_cast<int>(a.features.size[1]);
  const int targets = static_cast<int>(a.targets.size[1]);
  int* const group = lists.group + b * length;
  int* const member = lists.member + b * length;
  int* const counters = lists.counters
                            ? lists.counters + b * kListWarps * targets
                            : reinterpret_cast<int*>(shared);
  for (int i = threadIdx.x; i < kListWarps * targets; i += kListThreads) counters[i] = 0;
  find_groups(a, b, group);

  int* const mine = counters + warp_id() * targets;
  count_rows(group, length, targets, mine, [](int, int) {});
  __syncthreads();
  place_groups(counters, targets, lists.start + b * (targets + 1), scratch);
  __syncthreads();
  count_rows(group, length, targets, mine, [&](int row, int place) { member[place] = row; });
}

// --- the sums ---------------------------------------------------------------------------------

constexpr int kMergeThreads = 64;
constexpr int kAtOnce = 8;  // rows

// What a thread has of a row, as in memory: sixteen bytes, or an element where rows are not aligned.
template <class T, bool Aligned>
struct alignas(Aligned ? kVectorBytes : sizeof(T)) Piece {
  static constexpr int kSize = Aligned ? kVectorSize<T> : 1;
  T x[kSize];

  VTP_DEVICE static Piece load(const T* row) { return *reinterpret_cast<const Piece*>(row); }

  VTP_DEVICE static void store(const float (&values)[kSize], T* row) {
    Piece piece;
#pragma unroll
    for (int c = 0; c < kSize; ++c) piece.x[c] = from_float<T>(values[c]);
    if constexpr (Aligned) {  // what was computed, nvcc would store word by word
      int4 bits;
      memcpy(&bits, &piece, sizeof bits);
      __stwb(reinterpret_cast<int4*>(row), bits);
    } else {
      *row = piece.x[0];
    }
  }
};

// A sum over a group, and the target's own row.
template <class T, bool Aligned>
struct GroupSum {
  using Some = Piece<T, Aligned>;
  float sum[Some::kSize] = {}, own[Some::kSize] = {};
  float total = 0.0f;  // of the weights

  // Members first to first + kAtOnce, as far as there are any: all under way before one is added.
  VTP_DEVICE void add(const MergeRows& a, const int* member, int count, int64_t b, int64_t target,
                      const T* features) {
    int row[kAtOnce];
    float weight[kAtOnce];
    Some piece[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i] = member[i < count ? i : 0];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      piece[i] = Some::load(features + row[i] * a.features.stride[1]);
      weight[i] = 1.0f;
      if (a.mode == MergeMode::weighted) weight[i] = *view_as<const float>(a.weights).at(b, row[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool is_target = row[i] == target;
      const bool counts = i < count && !(is_target && a.mode == MergeMode::add_mean);
#pragma unroll
      for (int c = 0; c < Some::kSize; ++c) {
        const float x = to_float(piece[i].x[c]);
        own[c] = is_target ? x : own[c];
        sum[c] = counts ? __fadd_rn(sum[c], __fmul_rn(weight[i], x)) : sum[c];
      }
      total = counts ? total + weight[i] : total;
    }
  }

  VTP_DEVICE void finish(const MergeRows& a) {
#pragma unroll
    for (int c = 0; c < Some::kSize; ++c) {
      const float mean = sum[c] / total;
      const float merged = a.mode == MergeMode::add_mean ? own[c] + mean : mean;
      sum[c] = total > 0.0f ? merged : own[c];
    }
  }
};

template <class T, bool Aligned>
__global__ void __launch_bounds__(kMergeThreads)
    merge_members(MergeRows a, Lists lists, unsigned parts) {
  using Some = Piece<T, Aligned>;
  await_earlier_kernels();
  const int64_t length = a.features.size[1], channels = a.features.size[2];
  const int64_t targets = a.targets.size[1], group = blockIdx.x / parts;
  const int64_t b = group / targets, t = group % targets;
  const int64_t channel =
      (static_cast<int64_t>(blockIdx.x % parts) * kMergeThreads + threadIdx.x) * Some::kSize;
  if (channel >= channels) return;
  GroupSum<T, Aligned> sum;
  const int64_t target = *a.targets.at(b, t);
  if (is_within(target, length)) {
    const T* const features = view_as<const T>(a.features).at(b) + channel;
    const int* const start = lists.start + b * (targets + 1) + t;
    const int* const member = lists.member + b * length;
    const int end = start[1];
    for (int first = start[0]; first < end; first += kAtOnce) {
      sum.add(a, member + first, end - first, b, target, features);
    }
    sum.finish(a);
  }
  Some::store(sum.sum, static_cast<T*>(a.merged) + group * channels + channel);
}

// --- launches ---------------------------------------------------------------------------------

Lists take_lists(const MergeRows& a, Pieces& pieces) {
  const int64_t batch = a.features.size[0], length = a.features.size[1];
  const int64_t targets = a.targets.size[1];
  Lists lists;
  lists.group = pieces.take<int>(batch * length);
  lists.member = pieces.take<int>(batch * length);
  lists.start = pieces.take<int>(batch * (targets + 1));
  lists.counters = nullptr;
  if (targets > kMostInShared) lists.counters = pieces.take<int>(batch * kListWarps * targets);
  return lists;
}

}  // namespace

size_t merge_rows_workspace(const MergeRows& a) {
  Pieces pieces(nullptr);
  take_lists(a, pieces);
  return pieces.bytes();
}

void merge_rows(const MergeRows& a, void* workspace, Stream stream) {
  const int64_t batch = a.features.size[0], channels = a.features.size[2];
  const int64_t targets = a.targets.size[1];
  if (targets == 0 || channels == 0) return;
  Pieces pieces(workspace);
  const Lists lists = take_lists(a, pieces);
  const size_t counters = lists.counters ? 0 : kListWarps * targets * sizeof(int);
  OpStream ours(stream);
  launch("merge_rows lists", list_members, dim3(batch), kListThreads, counters, ours, a, lists);
  with_type(a.features.dtype, [&](auto type) {
    using T = decltype(type);
    with_bool(rows_are_aligned(a.features), [&](auto aligned) {
      constexpr bool kAligned = decltype(aligned)::value;
      const int64_t parts = divide_up(channels, kMergeThreads * Piece<T, kAligned>::kSize);
      launch(kAligned ? "merge_rows" : "merge_rows: any alignment", merge_members<T, kAligned>,
             dim3(batch * targets * parts), kMergeThreads, 0, ours, a, lists, parts);
    });
  });
}

}  // namespace vtp::cuda
