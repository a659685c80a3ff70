// Row gathering for compact_rows and compact_kv: any dtype, all tensors of a call in one parallel
// loop.
#include <algorithm>
#include <cstring>
#include <memory>

#include "ops.h"
#include "parallel.h"

namespace vtp::cpu {
namespace {

// The slots of one (tensor, batch row, head).
struct Chain {
  const char* source;
  char* target;
  const int64_t* indices;
  int64_t index_stride;
  int64_t count;  // how many of the slots are real

  int64_t index(int64_t slot) const { return indices[slot * index_stride]; }
};

Chain chain_of(const RowTensor& t, const RowIndices& rows, int64_t batch, int64_t head) {
  const auto& indices = rows.indices;
  const int64_t slots = indices.size[3];
  int64_t count = slots;
  if (rows.counts) count = std::clamp<int64_t>(rows.counts.at(t.layer, batch, head), 0, slots);
  return {t.source + batch * t.source_stride[0] + head * t.source_stride[1],
          t.target + batch * t.target_stride[0] + head * t.target_stride[1],
          indices.at(t.layer, batch, head), indices.stride[3], count};
}

template <class Row>
void copy_small(const Chain& c, const RowTensor& t, int64_t first, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    std::memcpy(c.target + slot * t.target_stride[2],
                c.source + c.index(slot - first) * t.source_stride[2], sizeof(Row));
  }
}

// Slots [begin, end), of which slot p takes row index(p - first). Neighbours that stay neighbours,
// such as the text around an image, go in one copy.
void copy_rows(const Chain& c, const RowTensor& t, int64_t first, int64_t begin, int64_t end) {
  switch (t.row_bytes) {
    case 1:
      return copy_small<uint8_t>(c, t, first, begin, end);
    case 2:
      return copy_small<uint16_t>(c, t, first, begin, end);
    case 4:
      return copy_small<uint32_t>(c, t, first, begin, end);
    case 8:
      return copy_small<uint64_t>(c, t, first, begin, end);
  }
  const bool dense = t.source_stride[2] == t.row_bytes && t.target_stride[2] == t.row_bytes;
  for (int64_t slot = begin, run; slot < end; slot += run) {
    const int64_t index = c.index(slot - first);
    run = 1;
    while (dense && slot + run < end && c.index(slot + run - first) == index + run) ++run;
    std::memcpy(c.target + slot * t.target_stride[2], c.source + index * t.source_stride[2],
                run * t.row_bytes);
  }
}

void clear_rows(const Chain& c, const RowTensor& t, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    std::memset(c.target + slot * t.target_stride[2], 0, t.row_bytes);
  }
}

// 64 KB of slots, so that the parts of all tensors of a call are of one size: enough of them for a
// single hidden state [1, K, 4096] to keep many threads busy, and threads get equal shares.
constexpr int64_t kPartBytes = 65536;

int64_t part_slots(const RowTensor& t, int64_t slots) {
  return std::clamp<int64_t>(kPartBytes / std::max<int64_t>(t.row_bytes, 1), 1,
                             std::max<int64_t>(slots, 1));
}

// Calls f(tensor, batch, head, begin, end) for the slots of every chain, in parallel: in parts, or
// each chain as a whole.
template <class F>
void for_each_chain(const CompactRows& a, bool whole, const F& f) {
  const int64_t slots = a.rows.indices.size[3];
  const std::unique_ptr<int64_t[]> start(new int64_t[a.tensor_count + 1]);
  start[0] = 0;
  int64_t bytes = 0;
  for (int64_t i = 0; i < a.tensor_count; ++i) {
    const RowTensor& t = a.tensors[i];
    const int64_t size = whole ? std::max<int64_t>(slots, 1) : part_slots(t, slots);
    start[i + 1] = start[i] + t.batch * t.heads * ((slots + size - 1) / size);
    bytes += t.batch * t.heads * slots * (32 + t.row_bytes);
  }
  const int64_t units = start[a.tensor_count];
  // A thread copies some 16 bytes a nanosecond as long as they are in its caches.
  parallel(units, bytes / 16 / std::max<int64_t>(units, 1), [&](int64_t unit) {
    const int64_t i = std::upper_bound(&start[0], &start[a.tensor_count + 1], unit) - &start[1];
    const RowTensor& t = a.tensors[i];
    const int64_t size = whole ? slots : part_slots(t, slots), parts = (slots + size - 1) / size;
    const int64_t chain = (unit - start[i]) / parts, begin = (unit - start[i]) % parts * size;
    f(t, chain / t.heads, chain % t.heads, begin, std::min(begin + size, slots));
  });
}

}  // namespace

void compact_rows(const CompactRows& a) {
  const int64_t slots = a.rows.indices.size[3];
  for_each_chain(a, false, [&](const RowTensor& t, int64_t batch, int64_t head, int64_t begin,
                               int64_t end) {
    const Chain c = chain_of(t, a.rows, batch, head);
    const int64_t first =
        a.align_right ? slots - c.count : 0;  // real slots: [first, first + count)
    const int64_t real_begin = std::clamp(first, begin, end);
    const int64_t real_end = std::clamp(first + c.count, real_begin, end);
    clear_rows(c, t, begin, real_begin);
    copy_rows(c, t, first, real_begin, real_end);
    clear_rows(c, t, real_end, end);
  });
}

void compact_rows_in_place(const CompactRows& a) {
  // Indices ascend, so slot p reads a row at or behind p that no earlier slot has written.
  for_each_chain(a, true, [&](const RowTensor& t, int64_t batch, int64_t head, int64_t, int64_t) {
    const Chain c = chain_of(t, a.rows, batch, head);
    for (int64_t slot = 0; slot < c.count; ++slot) {
      const int64_t index = c.index(slot);
      if (index == slot) continue;
      std::memcpy(c.target + slot * t.target_stride[2], c.source + index * t.source_stride[2],
                  t.row_bytes);
    }
  });
}

}  // namespace vtp::cpu
