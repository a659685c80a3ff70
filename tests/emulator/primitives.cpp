// The building blocks of kernels, each in a small kernel of its own, for test_emulator.py.
#include <pybind11/numpy.h>

#include <algorithm>
#include <string>

#include "module.h"
#include "vtp/mma.cuh"
#include "vtp/sortable.cuh"
#include "vtp/warp.cuh"

namespace py = pybind11;

namespace vtp::cuda {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Array<T> like(const py::array& shape_of) {
  return Array<T>(std::vector<py::ssize_t>(shape_of.shape(), shape_of.shape() + shape_of.ndim()));
}

// ---- Warp collectives ---------------------------------------------------------------------------

enum class Shuffle { from, up, down, exclusive_or };

template <class T>
__global__ void shuffle_kernel(Shuffle kind, const T* in, T* out, int operand, int width) {
  const T x = in[threadIdx.x];
  T y = x;
  if (kind == Shuffle::from) y = __shfl_sync(kAllLanes, x, operand, width);
  if (kind == Shuffle::up) y = __shfl_up_sync(kAllLanes, x, operand, width);
  if (kind == Shuffle::down) y = __shfl_down_sync(kAllLanes, x, operand, width);
  if (kind == Shuffle::exclusive_or) y = __shfl_xor_sync(kAllLanes, x, operand, width);
  out[threadIdx.x] = y;
}

template <class T>
Array<T> shuffle_block(const std::string& kind, Array<T> in, int operand, int width) {
  const char* kinds[] = {"from", "up", "down", "xor"};
  const auto at = std::find(std::begin(kinds), std::end(kinds), kind) - std::begin(kinds);
  Array<T> out = like<T>(in);
  launch("shuffle", shuffle_kernel<T>, 1, in.size(), 0, nullptr, static_cast<Shuffle>(at),
         in.data(), out.mutable_data(), operand, width);
  return out;
}

__global__ void vote_kernel(const int* in, unsigned* ballot, int* any, int* all, unsigned* match) {
  const int i = threadIdx.x;
  ballot[i] = __ballot_sync(kAllLanes, in[i]);
  any[i] = __any_sync(kAllLanes, in[i]);
  all[i] = __all_sync(kAllLanes, in[i]);
  match[i] = __match_any_sync(kAllLanes, in[i]);
}

py::tuple vote(Array<int> in) {
  auto ballot = like<unsigned>(in), match = like<unsigned>(in);
  auto any = like<int>(in), all = like<int>(in);
  launch("vote", vote_kernel, 1, in.size(), 0, nullptr, in.data(), ballot.mutable_data(),
         any.mutable_data(), all.mutable_data(), match.mutable_data());
  return py::make_tuple(ballot, any, all, match);
}

__global__ void block_vote_kernel(const int* in, int* count, int* any, int* all) {
  const int i = threadIdx.x;
  count[i] = __syncthreads_count(in[i]);
  any[i] = __syncthreads_or(in[i]);
  all[i] = __syncthreads_and(in[i]);
}

py::tuple block_vote(Array<int> in) {
  auto count = like<int>(in), any = like<int>(in), all = like<int>(in);
  launch("block_vote", block_vote_kernel, 1, in.size(), 0, nullptr, in.data(),
         count.mutable_data(), any.mutable_data(), all.mutable_data());
  return py::make_tuple(count, any, all);
}

// ---- csrc/vtp/warp.cuh ---------------------------------------------------------------------------

template <class T, int Width>
__global__ void warp_reduce_kernel(const T* in, T* sum, T* most, T* least) {
  sum[threadIdx.x] = warp_sum<Width>(in[threadIdx.x]);
  most[threadIdx.x] = warp_max<Width>(in[threadIdx.x]);
  least[threadIdx.x] = warp_min<Width>(in[threadIdx.x]);
}

template <int Threads>
__global__ void __launch_bounds__(Threads)
    block_kernel(const int* in, int* sum, int* most, int* before, int* total) {
  VTP_SHARED(BlockScratch<int>, scratch);
  const int i = threadIdx.x;
  sum[i] = block_reduce<Threads>(in[i], Sum{}, scratch);
  most[i] = block_reduce<Threads>(in[i], Max{}, scratch);
  before[i] = block_exclusive_sum<Threads>(in[i], &total[i], scratch);
  sum[i] = block_reduce<Threads>(in[i], Sum{}, scratch);  // the scratch may be used again
}

// Calls f<N>() for the N among the choices that equals n.
template <int... Choices, class F>
void with_choice(int n, const F& f) {
  const bool found = ((n == Choices && (f(std::integral_constant<int, Choices>{}), true)) || ...);
  if (!found) throw std::runtime_error("no such size");
}

template <class T>
py::tuple warp_reduce_groups(Array<T> in, int width) {
  auto sum = like<T>(in), most = like<T>(in), least = like<T>(in);
  with_choice<1, 2, 4, 8, 16, 32>(width, [&](auto chosen) {
    launch("warp_reduce", warp_reduce_kernel<T, chosen()>, 1, in.size(), 0, nullptr, in.data(),
           sum.mutable_data(), most.mutable_data(), least.mutable_data());
  });
  return py::make_tuple(sum, most, least);
}

py::tuple block_operations(Array<int> in) {
  auto sum = like<int>(in), most = like<int>(in), before = like<int>(in), total = like<int>(in);
  with_choice<32, 64, 96, 128, 256, 512, 1024>(in.size(), [&](auto chosen) {
    launch("block_operations", block_kernel<chosen()>, 1, in.size(), 0, nullptr, in.data(),
           sum.mutable_data(), most.mutable_data(), before.mutable_data(), total.mutable_data());
  });
  return py::make_tuple(sum, most, before, total);
}

// ---- csrc/vtp/mma.cuh ----------------------------------------------------------------------------

// One product, operands laid out as the header says.
template <class T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    x[i] = pair(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t* at = b + (2 * t + 8 * i) * 8 + g;
    y[i] = pair(at[0], at[8]);
  }
  float* rows[2] = {d + g * 8 + 2 * t, d + (g + 8) * 8 + 2 * t};
  float sums[4] = {rows[0][0], rows[0][1], rows[1][0], rows[1][1]};
  mma<T>(sums, x, y);
  for (int i = 0; i < 4; ++i) rows[i / 2][i % 2] = sums[i];
}

template <class T>
Array<float> multiply(Array<uint16_t> a, Array<uint16_t> b, Array<float> d) {
  auto out = like<float>(d);
  std::copy_n(d.data(), d.size(), out.mutable_data());
  launch("mma", mma_kernel<T>, 1, kWarp, 0, nullptr, a.data(), b.data(), out.mutable_data());
  return out;
}

struct Tile {
  alignas(16) uint16_t x[32][8];
};

template <bool Transposed>
__global__ void load_matrices_kernel(const uint16_t* in, uint32_t* out) {
  VTP_SHARED(Tile, tile);
  for (int i = 0; i < 8; ++i) tile.x[lane_id()][i] = in[lane_id() * 8 + i];
  __syncwarp();
  uint32_t registers[4];
  load_matrices<Transposed>(registers, tile.x[lane_id()]);
  for (int i = 0; i < 4; ++i) out[lane_id() * 4 + i] = registers[i];
}

Array<uint32_t> load_tile(Array<uint16_t> in, bool transposed) {
  Array<uint32_t> out({kWarp, 4});
  launch("load_matrices", transposed ? load_matrices_kernel<true> : load_matrices_kernel<false>, 1,
         kWarp, 0, nullptr, in.data(), out.mutable_data());
  return out;
}

// ---- Conversions ---------------------------------------------------------------------------------

template <class T>
__global__ void widen_kernel(const T* in, float* out) {
  const int64_t i = blockIdx.x * int64_t{kWarp} + threadIdx.x;
  out[i] = to_float(in[i]);
}

template <class T>
__global__ void narrow_kernel(const float* in, T* out) {
  const int64_t i = blockIdx.x * int64_t{kWarp} + threadIdx.x;
  out[i] = from_float<T>(in[i]);
}

__global__ void sortable_kernel(const float* in, uint32_t* keys, float* scores) {
  const int64_t i = blockIdx.x * int64_t{kWarp} + threadIdx.x;
  keys[i] = sortable(in[i]);
  scores[i] = score_of(keys[i]);
}

template <class T>
Array<float> widen(Array<uint16_t> in) {
  auto out = like<float>(in);
  launch("widen", widen_kernel<T>, in.size() / kWarp, kWarp, 0, nullptr,
         reinterpret_cast<const T*>(in.data()), out.mutable_data());
  return out;
}

template <class T>
Array<uint16_t> narrow(Array<float> in) {
  auto out = like<uint16_t>(in);
  launch("narrow", narrow_kernel<T>, in.size() / kWarp, kWarp, 0, nullptr, in.data(),
         reinterpret_cast<T*>(out.mutable_data()));
  return out;
}

py::tuple sortable_keys(Array<float> in) {
  auto keys = like<uint32_t>(in);
  auto scores = like<float>(in);
  launch("sortable", sortable_kernel, in.size() / kWarp, kWarp, 0, nullptr, in.data(),
         keys.mutable_data(), scores.mutable_data());
  return py::make_tuple(keys, scores);
}

}  // namespace
}  // namespace vtp::cuda

namespace vtp::emulator {

void bind_primitives(py::module_ m) {
  using namespace vtp::cuda;
  m.def("shuffle_int32", shuffle_block<int>);
  m.def("shuffle_float64", shuffle_block<double>);
  m.def("vote", vote);
  m.def("block_vote", block_vote);
  m.def("warp_reduce_int32", warp_reduce_groups<int>);
  m.def("warp_reduce_uint32", warp_reduce_groups<unsigned>);
  m.def("warp_reduce_float64", warp_reduce_groups<double>);
  m.def("block_operations", block_operations);
  m.def("mma_float16", multiply<__half>);
  m.def("mma_bfloat16", multiply<__nv_bfloat16>);
  m.def("load_matrices", load_tile);
  m.def("float16_to_float", widen<__half>);
  m.def("bfloat16_to_float", widen<__nv_bfloat16>);
  m.def("float_to_float16", narrow<__half>);
  m.def("float_to_bfloat16", narrow<__nv_bfloat16>);
  m.def("sortable", sortable_keys);
}

}  // namespace vtp::emulator
