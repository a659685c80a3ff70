// The passes of attention_scores over K where many query rows share it: what key_pass does in
// attention_scores.cu, with products of a warpgroup. This file alone is compiled for 9.0a.
//
// A block keeps its 128 keys in shared memory and lets 64 query rows at a time pass by there. A
// warp ends with all products of 16 rows, so that its rows' statistics are its own, to be written as
// they are, and constants of rows pass through registers. While it works on its products the next
// rows are on their way to where the last ones were.
#include "vtp/key_pass.cuh"

#if defined(VTP_WITH_WARPGROUP) || defined(VTP_EMULATOR)

#include "vtp/async_copy.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/wgmma.cuh"
#include "vtp/wgmma_launch.cuh"

namespace vtp::cuda {
namespace {

static_assert(kThreads == kWarpgroup && kProductColumns == kPassKeys);

constexpr int kWarpRows = kProductRows / kWarps;
constexpr int kGroups = kProductColumns / 8;
constexpr int kWords = kProductColumns / kWarp;  // of a bit for each key
using Products = float[kProductSums];
using Rows = RowTile<kProductRows>;

VTP_DEVICE float& product(Products& products, int i, int n, int j) {
  return products[4 * n + 2 * i + j];
}

constexpr int kTileDim = 64;

// Rows of up to kTileDim * Tiles elements.
template <int Tiles>
struct Operands {
  OperandTile<kProductColumns> keys[Tiles];
  OperandTile<kProductRows> queries[Tiles];
};

struct WarpgroupShared {
  unsigned wanted[kWords];  // bits of the keys the pass has to do with
  float columns[kWarps][kProductColumns];
};

// Where a lane puts its unit of a warp's rows, of which it takes every fourth. Rows four apart differ
// in the swizzle, rows eight apart do not.
template <int Rows, int Tiles>
struct LanePlaces {
  int4 *even, *odd;

  VTP_DEVICE LanePlaces(OperandTile<Rows> (&tiles)[Tiles], int first)
      : even(tiles[0].at(first + lane_id() / 8, lane_id() % 8)),
        odd(tiles[0].at(first + 4 + lane_id() / 8, lane_id() % 8)) {}

  VTP_DEVICE int4* at(int i, int tile) const {
    constexpr int kUnits = OperandTile<Rows>::kUnits;
    return (i % 2 ? odd : even) + (i / 2 * OperandTile<Rows>::kPeriod + tile * Rows) * kUnits;
  }
};

// Asks for the lane's units of its row i; behind the row's end, for another one.
template <class T, int Rows, int Tiles>
VTP_DEVICE void copy_row(const LanePlaces<Rows, Tiles>& places, int i, const T* source, int dim) {
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    const int first = kTileDim * tile + lane_id() % 8 * kVectorSize<T>;
    copy_async(places.at(i, tile), source + (first < dim ? first : 0), true);
  }
}

// Where rows are shorter than their tiles, what is behind them counts in every product and must be
// zero. The lane writes what it has copied itself, once that is there.
template <class T, int Rows, int Tiles>
VTP_DEVICE void fill_up(OperandTile<Rows> (&tiles)[Tiles], int dim) {
  if (dim == kTileDim * Tiles) return;
  const LanePlaces places(tiles, Rows / kWarps * warp_id());
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    if (kTileDim * tile + lane_id() % 8 * kVectorSize<T> < dim) continue;
#pragma unroll
    for (int i = 0; i < Rows / kWarps / 4; ++i) *places.at(i, tile) = int4{0, 0, 0, 0};
  }
}

// The warp's keys, of which the first is `source`: eight lanes for each. One that is not read may
// hold anything, since nobody looks at its products.
template <class T, int Tiles>
VTP_DEVICE void copy_keys(Operands<Tiles>& operands, const View<const T, 4>& key, const T* source,
                          unsigned read) {
  const LanePlaces places(operands.keys, kWarp * warp_id());
  source += lane_id() / 8 * key.stride[2];
#pragma unroll
  for (int i = 0; i < kWarp / 4; ++i) {
    const bool is_read = read >> (4 * i + lane_id() / 8) & 1;
    if (is_read) copy_row(places, i, source, static_cast<int>(key.size[3]));
    source += 4 * key.stride[2];
  }
}

// A warp's rows of a tile on their way: elements to shared memory, constants to registers, those of
// row i in lane i. In the place of a row that does not exist comes the tile's first.
template <class T, int Tiles, Pass P>
struct StagedRows {
  RawWeight<P> raw;
  bool exists;

  VTP_DEVICE void load(const PassArguments& p, const Block& block, const Rows& rows,
                       Operands<Tiles>& operands) {
    const auto query = view_as<const T>(p.a.query);
    const int first = kWarpRows * warp_id(), own = first + lane_id() % kWarpRows;
    const QueryRow at(p, block, rows.first + (own < rows.count ? own : 0));
    exists = lane_id() < kWarpRows && own < rows.count;
    if (exists) raw.load(p, block, at);
    const int64_t offset = at.head * query.stride[1] + at.m * query.stride[2];
    const LanePlaces places(operands.queries, first);
    const T* source[kWarpRows / 4];
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int64_t row_offset = __shfl_sync(kAllLanes, offset, 4 * i + lane_id() / 8);
      source[i] = query.at(block.batch) + row_offset;
    }
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      copy_row(places, i, source[i], static_cast<int>(query.size[3]));
    }
  }

  VTP_DEVICE RowWeight weight(const PassArguments& p) const {
    return exists ? raw.weight(p) : RowWeight{0.0f, 0.0f, -1};
  }
};

// The products of all rows and keys at hand.
template <class T, int Tiles>
VTP_DEVICE void multiply_tiles(const Operands<Tiles>& operands, Products& products) {
  begin_products();
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < OperandTile<kProductRows>::kProducts; ++i) {
      wgmma<T>(products, operand(operands.queries[tile], i), operand(operands.keys[tile], i),
               tile + i > 0);
    }
  }
  commit_products();
  wait_products(products);
}

// Which keys the lane's two rows attend to, row i being 8 i + lane / 4 of the warp's.
struct Attends {
  unsigned keys[2][kWords];  // the bit of the lane's key (n, j) is 8 n + j
  bool any, every;           // over the warp

  VTP_DEVICE Attends(const RowWeight& weight, const unsigned (&wanted)[kWords], int first) {
    bool any = false, every = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int last = __shfl_sync(kAllLanes, weight.last, 8 * i + lane_id() / 4);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const unsigned bits = wanted[word] & bits_until(last, first + kWarp * word);
        any = any || bits != 0;
        every = every && bits == kAllLanes;
        keys[i][word] = bits >> lane_id() % 4 * 2;
      }
    }
    this->any = __any_sync(kAllLanes, any);
    this->every = __all_sync(kAllLanes, every);
  }

  VTP_DEVICE bool operator()(int i, int n, int j) const {
    return keys[i][n / 4] & (1u << (8 * (n % 4) + j));
  }
};

// --- statistics -------------------------------------------------------------------------------

// Of the lane's row i over all keys. The factor is above 0, so that the largest product makes the
// largest logit.
VTP_DEVICE RowStatistic statistic_of(Products& products, int i, float factor) {
  float maximum = -INFINITY, sum = 0.0f;  // fmaxf ignores NaN, the sum does not
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    maximum = fmaxf(maximum, fmaxf(product(products, i, n, 0), product(products, i, n, 1)));
  }
  maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
  maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2)) * factor;
  const float base = finite_base(maximum);
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    sum += fast_exp2(fmaf(product(products, i, n, 0), factor, -base)) +
           fast_exp2(fmaf(product(products, i, n, 1), factor, -base));
  }
  return {maximum, warp_sum<4>(sum)};
}

VTP_DEVICE void write_statistics(const PassArguments& p, const Block& block, const Rows& rows,
                                 const Attends& attends, Products& products) {
  const int64_t number = block.kv_head * p.group * p.a.query.size[2] + rows.first;
  RowStatistic* out = p.parts.statistics +
                      (block.batch * p.parts.tiles + block.tile) * p.parts.rows + number;
  if (attends.any && !attends.every) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!attends(i / 2, n, i % 2)) product(products, i / 2, n, i % 2) = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = kWarpRows * warp_id() + 8 * i + lane_id() / 4;
    const RowStatistic statistic =
        attends.any ? statistic_of(products, i, p.factor) : no_logits();
    if (lane_id() % 4 == 0 && row < rows.count) out[row] = statistic;
  }
}

// --- columns ----------------------------------------------------------------------------------

// Adds the weights of the lane's rows to its keys' columns.
template <class Attended>
VTP_DEVICE void add_weights(Products& products, const RowWeight& weight, float factor,
                            float (&sum)[kGroups][2], const Attended& attended) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 8 * i + lane_id() / 4;
    const float base = __shfl_sync(kAllLanes, weight.base, row);
    const float share = __shfl_sync(kAllLanes, weight.share, row);
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = fast_exp2(fmaf(product(products, i, n, j), factor, -base));
        const float with_row = fmaf(x, share, sum[n][j]);
        sum[n][j] = attended(i, n, j) ? with_row : sum[n][j];
      }
    }
  }
}

// Over a warp's rows, to out[key]. Lanes with the same keys halve them among themselves.
VTP_DEVICE void add_over_lanes(float (&sum)[kGroups][2], float* out) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane_id() & 4 * half;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (n % 8 >= half) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float low = sum[n][j], high = sum[n + half][j];
        const float other = __shfl_xor_sync(kAllLanes, upper ? low : high, 4 * half);
        sum[n][j] = (upper ? high : low) + other;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kGroups; n += 8) {
    *reinterpret_cast<float2*>(out + 8 * n + 2 * lane_id()) = float2{sum[n][0], sum[n][1]};
  }
}

// What was added up over the rows of a segment becomes a head's column; of several, the largest.
// A thread ends with its own key's.
VTP_DEVICE void end_segment(float (&sum)[kGroups][2], float (&columns)[kWarps][kProductColumns],
                            float& column) {
  add_over_lanes(sum, columns[warp_id()]);
  __syncthreads();
  float total = columns[0][threadIdx.x];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total += columns[warp][threadIdx.x];
  column = larger(column, total);
#pragma unroll
  for (int n = 0; n < kGroups; ++n) sum[n][0] = sum[n][1] = 0.0f;
}

// --- the pass ---------------------------------------------------------------------------------

template <Pass P>
constexpr int kBlocksPerMultiprocessor = P == Pass::statistics ? 4 : 3;

template <class T, int Tiles, Pass P>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<P>)
    warpgroup_pass(const PassArguments p) {
#ifdef VTP_HAS_WGMMA
  VTP_DYNAMIC_SHARED(memory);
  VTP_SHARED(WarpgroupShared, shared);
  auto& operands = tiles_in<Operands<Tiles>>(memory);
  release_next_kernel();
  const Block block = block_of(p);
  const int tile_first = block.tile * kProductColumns, first = tile_first + kWarp * warp_id();
  WarpKeys<P> own(p.a, first, kWarp);
  if (own.masks_come_first(p.a)) own.load_masks(p.a, block.batch, first);
  if (p.parts.key_copy) await_earlier_kernels();  // else keys are given: there before the others
  const auto key = view_as<const T>(p.a.key);
  const int dim = static_cast<int>(key.size[3]);
  copy_keys(operands, key, key.at(block.batch, block.kv_head, first), own.read(p.a));
  if (!own.masks_come_first(p.a)) own.load_masks(p.a, block.batch, first);
  await_earlier_kernels();
  Rows rows(p);
  StagedRows<T, Tiles, P> staged;
  staged.load(p, block, rows, operands);
  commit_copies();

  const unsigned mine = own.wanted();
  if (lane_id() == 0) shared.wanted[warp_id()] = mine;
  wait_copies<0>();
  fill_up<T>(operands.keys, dim);
  if (!__syncthreads_or(own.is_wanted())) {
    if (P == Pass::statistics) write_no_statistics(p, block);
    return;
  }
  float sum[kGroups][2] = {}, column = 0.0f;
  for (;;) {
    const RowWeight weight = staged.weight(p);
    wait_copies<0>();
    fill_up<T>(operands.queries, dim);
    fence_operands();
    const bool any = __syncthreads_or(weight.last >= tile_first);  // and the operands are there
    Products products;
    if (any) multiply_tiles<T>(operands, products);
    __syncthreads();  // the queries are no longer needed
    const Rows next = rows.next(p);
    if (next.exists(p)) staged.load(p, block, next, operands);
    commit_copies();
    const Attends attends(weight, shared.wanted, tile_first);
    if constexpr (P == Pass::statistics) {
      write_statistics(p, block, rows, attends, products);
    } else {
      if (attends.every) {
        add_weights(products, weight, p.factor, sum, [](int, int, int) { return true; });
      } else if (attends.any) {
        add_weights(products, weight, p.factor, sum, attends);
      }
      if (rows.ends_segment()) end_segment(sum, shared.columns, column);
    }
    if (!next.exists(p)) break;
    rows = next;
  }
  if constexpr (P == Pass::columns) {
    const int64_t row = block.batch * p.a.key.size[1] + block.kv_head;
    p.parts.columns[row * p.parts.stride + tile_first + threadIdx.x] = column;
  }
#else
  __trap();  // compiled for a device that has no such products
#endif
}

// --- host -------------------------------------------------------------------------------------

// What both passes over 128 keys take, as a share of what key_pass takes: instructions of a warp if
// all keys are attended to (from machine code for 9.0), passes of shared memory (from the emulator).
//
//   rows                    64      80      96      128     256
//   D = 128  instructions   0.70    0.85    0.78    0.61    0.55
//            passes         1.10    1.42    1.23    0.94    0.85
//   D = 64   instructions   0.87    1.00    0.92    0.79    0.74
//            passes         0.99    1.19    1.04    0.84    0.76
//
// Bytes and round trips are the same. Of instructions both have most, so they decide. From 65 to 80
// rows, where the second tile has work for one warp in four, nothing is won at D = 64.
bool pays(int rows) { return rows == kProductRows || rows > kProductRows + kWarpRows; }

template <class T, Pass P>
void launch_typed(const PassArguments& p, dim3 grid, OpStream& stream) {
  const auto start = [&](auto tiles) {
    launch("attention_scores by warpgroup", warpgroup_pass<T, tiles, P>, grid, dim3(kThreads),
           kTileBytes<Operands<tiles>>, stream, p);
  };
  if (p.a.query.size[3] <= kTileDim) return start(std::integral_constant<int, 1>{});
  start(std::integral_constant<int, 2>{});
}

}  // namespace

template <Pass P>
bool launch_warpgroup_pass(const PassArguments& p, dim3 grid, OpStream& stream) {
  const DType dtype = p.a.query.dtype;
  const bool has_16_bits = dtype == DType::f16 || dtype == DType::bf16;
  if (!has_16_bits || p.a.query.size[3] > 2 * kTileDim || !pays(p.segment_rows)) return false;
  if (!(p.factor > 0.0f)) return false;  // or the largest product makes not the largest logit
  if (!wgmma_is_on("attention_scores")) return false;
  if (dtype == DType::f16) {
    launch_typed<__half, P>(p, grid, stream);
  } else {
    launch_typed<__nv_bfloat16, P>(p, grid, stream);
  }
  return true;
}

#else  // no code for 9.0 is asked for

namespace vtp::cuda {

template <Pass P>
bool launch_warpgroup_pass(const PassArguments&, dim3, OpStream&) {
  return false;
}

#endif

template bool launch_warpgroup_pass<Pass::statistics>(const PassArguments&, dim3, OpStream&);
template bool launch_warpgroup_pass<Pass::columns>(const PassArguments&, dim3, OpStream&);

}  // namespace vtp::cuda
