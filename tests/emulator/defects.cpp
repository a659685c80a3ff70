// Kernels with a planted mistake, which the emulator must catch, beside their right version where
// results tell them apart. Memory errors are marked "defect: <name>": a sanitizer's report must name
// that line.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "module.h"
#include "vtp/async_copy.cuh"
#include "vtp/cluster.cuh"
#include "vtp/dependent_launch.cuh"
#include "vtp/vector.cuh"
#include "vtp/warp.cuh"

namespace py = pybind11;

namespace vtp::cuda {
namespace {

constexpr int kThreads = 64;

struct Ints {
  int x[kThreads];
};

struct alignas(16) Floats4 {
  float x[kThreads * 4];
};

using Output = std::vector<int>;

// Runs a kernel of one block that writes an int per thread.
template <class... Parameters, class... Arguments>
Output output_of(const char* name, void (*kernel)(int*, Parameters...),
                 const Arguments&... arguments) {
  Output out(kThreads, -1);
  launch(name, kernel, 1, kThreads, 0, nullptr, out.data(), arguments...);
  return out;
}

// ---- Order among threads ------------------------------------------------------------------------

// Every thread takes the number of the one before it.
__global__ void neighbour_kernel(int* out, bool barrier) {
  VTP_SHARED(Ints, numbers);
  const int i = threadIdx.x;
  numbers.x[i] = i;
  if (barrier) __syncthreads();
  out[i] = i == 0 ? 0 : numbers.x[i - 1];
}

// The same within warps.
__global__ void lane_neighbour_kernel(int* out, bool barrier) {
  VTP_SHARED(Ints, numbers);
  const int i = threadIdx.x;
  numbers.x[i] = i;
  if (barrier) __syncwarp();
  out[i] = lane_id() == 0 ? 0 : numbers.x[i - 1];
}

// Here a shuffle stands where __syncwarp should: lanes meet, but their memory accesses stay unordered.
__global__ void shuffle_as_barrier_kernel(int* out) {
  VTP_SHARED(Ints, numbers);
  const int i = threadIdx.x;
  numbers.x[i] = i;
  __shfl_sync(kAllLanes, i, 0);
  out[i] = lane_id() == 0 ? 0 : numbers.x[i - 1];
}

// The scratch is written again while some may still read it.
__global__ void reused_scratch_kernel(int* out) {
  VTP_SHARED(int, scratch);
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) scratch = round;
    __syncthreads();
    sum += scratch;
  }
  out[threadIdx.x] = sum;
}

// All agree on what they write, yet nothing orders them.
__global__ void same_value_kernel(int* out) {
  VTP_SHARED(int, found);
  found = 1;
  __syncthreads();
  out[threadIdx.x] = found;
}

// Counted with atomics, read without a barrier.
__global__ void early_total_kernel(int* out) {
  VTP_SHARED(int, total);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1);
  out[threadIdx.x] = total;
}

// Every thread waits for its own copies, but reads those of another.
__global__ void early_copies_kernel(int* out) {
  VTP_SHARED(Floats4, copy);
  const int i = threadIdx.x;
  copy_async(&copy.x[i * 4], nullptr, false);
  commit_copies();
  wait_copies<0>();
  out[i] = copy.x[(i + 1) % kThreads * 4] == 0.0f;
}

// Blocks write the same element.
__global__ void shared_total_kernel(int* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

void shared_total() {
  Output out(1);
  launch("shared_total", shared_total_kernel, 2, kWarp, 0, nullptr, out.data());
}

// Threads take slots in the order they come: right as a set, not as a list.
__global__ void slots_kernel(int* out) {
  VTP_SHARED(int, next);
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  out[atomicAdd(&next, 1)] = threadIdx.x;
}

// A block relies on the one before it.
__global__ void block_chain_kernel(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? 1 : out[blockIdx.x - 1] + 1;
}

Output block_chain() {
  Output out(8, 0);
  launch("block_chain", block_chain_kernel, out.size(), kWarp, 0, nullptr, out.data());
  return out;
}

// ---- Barriers and collectives -------------------------------------------------------------------

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void early_return_kernel(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x < 40) {
    out[threadIdx.x] = 0;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void two_collectives_kernel(int* out) {
  const int i = threadIdx.x;
  out[i] = i < 40 ? __ballot_sync(kAllLanes, 1) : __shfl_sync(kAllLanes, i, 0);
}

__global__ void barrier_meets_collective_kernel(int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __any_sync(kAllLanes, 1);
  }
}

__global__ void absent_lanes_kernel(int* out) {
  if (threadIdx.x >= 40) return;
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void some_lanes_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);
}

__global__ void some_lanes_reduced_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __reduce_add_sync(0xffffu, 1);
}

__global__ void two_reductions_kernel(int* out) {
  const int i = threadIdx.x;
  out[i] = i < 40 ? __reduce_add_sync(kAllLanes, i) : __reduce_max_sync(kAllLanes, i);
}

__global__ void partial_warp_kernel() { __syncwarp(); }

void partial_warp() { launch("partial_warp", partial_warp_kernel, 1, 48, 0, nullptr); }

// ---- Clusters -----------------------------------------------------------------------------------

// Where a kernel of clusters goes wrong.
enum class Cluster {
  right,
  no_barrier,      // between a write and another block's read of it
  between,         // the write comes after cluster_arrive
  ends_early,      // no barrier after the last read
  ends_before,     // the read comes after that barrier
  not_begun,       // no barrier before the first access
  beyond,          // a block that is not there
  not_shared,      // an address of global memory
  divergent,       // a block stays away from the barrier
  half_a_block,    // threads do
  arrives_twice,
  waits_for_none,
};

// Every thread takes the number of the one before it in the block after its own.
__global__ void cluster_kernel(int* out, Cluster how) {
  VTP_SHARED(Ints, numbers);
  const int i = threadIdx.x, next = (cluster_rank() + 1) % cluster_blocks();
  const int number = static_cast<int>(blockIdx.x) * kThreads + i;
  if (how == Cluster::divergent && cluster_rank() == 1) return;
  if (how == Cluster::half_a_block && i >= 40) return;
  if (how == Cluster::waits_for_none) cluster_wait();
  if (how != Cluster::not_begun) cluster_sync();
  if (how != Cluster::between) numbers.x[i] = number;
  cluster_arrive();
  if (how == Cluster::arrives_twice) cluster_arrive();
  if (how == Cluster::between) numbers.x[i] = number;
  const int* from = nullptr;
  if (how == Cluster::not_begun) from = map_shared_rank(numbers.x, next);
  if (how == Cluster::no_barrier) from = map_shared_rank(numbers.x, next);
  const int at = (i + kThreads - 1) % kThreads;
  int found = from ? from[at] : 0;
  cluster_wait();
  if (how == Cluster::beyond) from = map_shared_rank(numbers.x, cluster_blocks());
  if (how == Cluster::not_shared) from = map_shared_rank(out, next);
  if (!from) from = map_shared_rank(numbers.x, next);
  if (how != Cluster::no_barrier && how != Cluster::ends_before) found = from[at];
  if (how != Cluster::ends_early) cluster_sync();
  if (how == Cluster::ends_before) {
    found = from[at];  // defect: cluster_ends_before
  }
  out[number] = found;
}

// Six blocks in clusters of three, or of another size.
Output cluster(Cluster how, unsigned size) {
  Output out(6 * kThreads, -1);
  launch(LaunchOptions{size}, "cluster", cluster_kernel, 6, kThreads, 0, nullptr, out.data(), how);
  return out;
}

// ---- Dependent launches -------------------------------------------------------------------------

// What a kernel does too early, before it has waited for those it follows.
enum class Dependent {
  right,
  reads,          // what the one before writes
  reads_oldest,   // what the one before that writes
  writes,         // what the one before writes
  overwrites,     // what the one before reads
  returns,        // some threads end
  leaves_to_one,  // only one thread waits
};

__global__ void first_kernel(int* numbers) {
  release_next_kernel();
  await_earlier_kernels();
  numbers[threadIdx.x] = threadIdx.x;
}

__global__ void second_kernel(const int* numbers, int* doubled) {
  release_next_kernel();
  await_earlier_kernels();
  doubled[threadIdx.x] = 2 * numbers[threadIdx.x];
}

__global__ void third_kernel(int* numbers, int* doubled, int* out, Dependent how) {
  const int i = threadIdx.x;
  int sum = 0;
  if (how == Dependent::reads) sum = doubled[i];
  if (how == Dependent::reads_oldest) sum = numbers[i];
  if (how == Dependent::writes) doubled[i] = 0;
  if (how == Dependent::overwrites) numbers[i] = 0;
  if (how == Dependent::returns && i >= 40) return;
  if (how != Dependent::leaves_to_one || i == 0) await_earlier_kernels();
  __syncthreads();
  out[i] = sum + doubled[i] + numbers[i];
}

// Three kernels, each behind the one before; from the second on dependent launches.
Output dependent(Dependent how) {
  Output numbers(kThreads, -1), doubled(kThreads, -1), out(kThreads, -1);
  OpStream stream(nullptr);
  launch("first", first_kernel, 1, kThreads, 0, stream, numbers.data());
  launch("second", second_kernel, 1, kThreads, 0, stream, numbers.data(), doubled.data());
  launch("third", third_kernel, 1, kThreads, 0, stream, numbers.data(), doubled.data(),
         out.data(), how);
  return out;
}

// ---- Asynchronous copies ------------------------------------------------------------------------

// Two groups of copies; the first must have landed.
__global__ void copies_kernel(const float* in, float* out, int pending) {
  VTP_SHARED(Floats4, first);
  VTP_SHARED(Floats4, second);
  const int at = threadIdx.x * 4;
  copy_async(&first.x[at], in + at, true);
  commit_copies();
  copy_async(&second.x[at], in + at, threadIdx.x % 2 == 0);
  commit_copies();
  if (pending == 0) wait_copies<0>();
  if (pending == 1) wait_copies<1>();
  for (int i = 0; i < 4; ++i) {
    out[at + i] = first.x[at + i];
    out[kThreads * 4 + at + i] = second.x[at + i];
  }
}

// pending 0 waits for both groups, 1 for the first, 2 for none.
py::array_t<float> copies(int pending) {
  std::vector<Floats4> in(1);
  for (int i = 0; i < kThreads * 4; ++i) in[0].x[i] = static_cast<float>(i);
  py::array_t<float> out(2 * kThreads * 4);
  launch("copies", copies_kernel, 1, kThreads, 0, nullptr, in[0].x, out.mutable_data(), pending);
  return out;
}

__global__ void misaligned_copy_kernel(const float* in) {
  VTP_SHARED(Floats4, copy);
  copy_async(&copy.x[1], in, true);
}

void misaligned_copy() {
  const std::vector<Floats4> in(1);
  launch("misaligned_copy", misaligned_copy_kernel, 1, kWarp, 0, nullptr, in[0].x);
}

// ---- Memory -------------------------------------------------------------------------------------

__global__ void uninitialised_kernel(float* out, int* bits) {
  VTP_SHARED(float, x);
  VTP_DYNAMIC_SHARED(bytes);
  out[2 * blockIdx.x] = x;
  out[2 * blockIdx.x + 1] = *reinterpret_cast<float*>(bytes);
  bits[blockIdx.x] = __float_as_int(x);
}

py::tuple uninitialised() {
  py::array_t<float> out(8);
  py::array_t<int> bits(4);
  launch("uninitialised", uninitialised_kernel, 4, 1, 16, nullptr, out.mutable_data(),
         bits.mutable_data());
  return py::make_tuple(out, bits);
}

__global__ void shared_overrun_kernel(int by) {
  VTP_SHARED(Ints, numbers);
  int* first = numbers.x;
  first[by < 0 ? by : kThreads - 1 + by] = 0;  // defect: shared_overrun
}

void shared_overrun(int by) {
  launch("shared_overrun", shared_overrun_kernel, 1, 1, 0, nullptr, by);
}

__global__ void dynamic_overrun_kernel(int at) {
  VTP_DYNAMIC_SHARED(bytes);
  bytes[at] = 0;  // defect: dynamic_overrun
}

void dynamic_overrun(int at) {
  launch("dynamic_overrun", dynamic_overrun_kernel, 1, 1, 100, nullptr, at);
}

__global__ void global_write_kernel(int* out, int count) {
  if (static_cast<int>(threadIdx.x) <= count) {
    out[threadIdx.x] = 0;  // defect: global_write
  }
}

void global_write() {
  const std::unique_ptr<int[]> out(new int[50]);
  launch("global_write", global_write_kernel, 1, kThreads, 0, nullptr, out.get(), 50);
}

__global__ void global_read_kernel(const int* in, int* out) {
  int sum = 0;
  for (int i = threadIdx.x; i <= 50; i += kThreads) {
    sum += in[i];  // defect: global_read
  }
  atomicAdd(out, sum);
}

void global_read() {
  const std::unique_ptr<int[]> in(new int[50]());
  int out = 0;
  launch("global_read", global_read_kernel, 1, kThreads, 0, nullptr, in.get(), &out);
}

__global__ void async_read_kernel(const float* in) {
  VTP_SHARED(Floats4, copy);
  copy_async(&copy.x[threadIdx.x * 4], in + threadIdx.x * 4, true);  // defect: async_read
  commit_copies();
  wait_copies<0>();
}

void async_read() {
  const std::unique_ptr<Floats4[]> in(new Floats4[1]());
  launch("async_read", async_read_kernel, 1, kThreads, 0, nullptr, in[0].x + 4);
}

__global__ void misaligned_load_kernel(const float* in, float* out) {
  const int4 bits = *reinterpret_cast<const int4*>(in);  // defect: misaligned_load
  out[0] = __int_as_float(bits.x);
}

void misaligned_load() {
  const std::vector<Floats4> in(1);
  float out;
  launch("misaligned_load", misaligned_load_kernel, 1, 1, 0, nullptr, in[0].x + 1, &out);
}

__device__ __attribute__((noinline)) int deep(int depth, volatile int* sink) {
  volatile char frame[4096];
  frame[depth % 4096] = static_cast<char>(*sink);
  if (depth == 0) return frame[0];
  return deep(depth - 1, sink) + frame[depth % 4096];  // defect: stack_overflow
}

__global__ void stack_overflow_kernel(int* out) { *out = deep(1 << 20, out); }

void stack_overflow() {
  int out = 0;
  launch("stack_overflow", stack_overflow_kernel, 1, 1, 0, nullptr, &out);
}

// ---- Launches -----------------------------------------------------------------------------------

__global__ void idle_kernel() {}

void idle(int64_t grid_x, int64_t grid_y, int block_x, int block_z, size_t dynamic_shared) {
  launch("idle", idle_kernel, dim3(grid_x, grid_y), dim3(block_x, 1, block_z), dynamic_shared,
         nullptr);
}

struct Large {
  int x[12 * 1024 + 1];
};

__global__ void large_static_kernel() {
  VTP_SHARED(Large, large);
  large.x[0] = 0;
}

struct Small {
  int x[2 * 1024];
};

__global__ void static_and_dynamic_kernel() {
  VTP_SHARED(Small, small);
  small.x[0] = 0;
}

void static_and_dynamic(size_t dynamic_shared) {
  launch("static_and_dynamic", static_and_dynamic_kernel, 1, 1, dynamic_shared, nullptr);
}

void large_static() { launch("large_static", large_static_kernel, 1, 1, 0, nullptr); }

__global__ void throwing_kernel() {
  if (threadIdx.x == 5) throw std::runtime_error("thrown by a kernel");
  __syncthreads();
}

void throwing() { launch("throwing", throwing_kernel, 2, kThreads, 0, nullptr); }

__global__ void trap_kernel() {
  if (threadIdx.x == 5) __trap();
}

void trap() { launch("trap", trap_kernel, 1, kThreads, 0, nullptr); }

}  // namespace
}  // namespace vtp::cuda

namespace vtp::emulator {

void bind_defects(py::module_ m) {
  using namespace vtp::cuda;
  m.def("neighbour", [](bool b) { return output_of("neighbour", neighbour_kernel, b); });
  m.def("neighbour_is_right", [] { output_of("neighbour", neighbour_kernel, true); });
  m.def("lane_neighbour_is_right",
        [] { output_of("lane_neighbour", lane_neighbour_kernel, true); });
  m.def("neighbour_races", [] { output_of("neighbour", neighbour_kernel, false); });
  m.def("lane_neighbour_races",
        [] { output_of("lane_neighbour", lane_neighbour_kernel, false); });
  m.def("shared_total", shared_total);
  m.def("lane_neighbour",
        [](bool b) { return output_of("lane_neighbour", lane_neighbour_kernel, b); });
  m.def("slots", [] { return output_of("slots", slots_kernel); });
  m.def("block_chain", block_chain);

#define VTP_BIND(name) m.def(#name, [] { return output_of(#name, name##_kernel); })
  VTP_BIND(shuffle_as_barrier);
  VTP_BIND(reused_scratch);
  VTP_BIND(same_value);
  VTP_BIND(early_total);
  VTP_BIND(early_copies);
  VTP_BIND(divergent_barrier);
  VTP_BIND(early_return);
  VTP_BIND(two_barriers);
  VTP_BIND(two_collectives);
  VTP_BIND(barrier_meets_collective);
  VTP_BIND(absent_lanes);
  VTP_BIND(some_lanes);
  VTP_BIND(some_lanes_reduced);
  VTP_BIND(two_reductions);
#undef VTP_BIND
  m.def("partial_warp", partial_warp);

#define VTP_BIND(name) \
  m.def(                \
      "cluster_" #name, [](unsigned size) { return cluster(Cluster::name, size); }, \
      py::arg("size") = 3)
  VTP_BIND(right);
  VTP_BIND(no_barrier);
  VTP_BIND(between);
  VTP_BIND(ends_early);
  VTP_BIND(ends_before);
  VTP_BIND(not_begun);
  VTP_BIND(beyond);
  VTP_BIND(not_shared);
  VTP_BIND(divergent);
  VTP_BIND(half_a_block);
  VTP_BIND(arrives_twice);
  VTP_BIND(waits_for_none);
#undef VTP_BIND

#define VTP_BIND(name) m.def("dependent_" #name, [] { return dependent(Dependent::name); })
  VTP_BIND(right);
  VTP_BIND(reads);
  VTP_BIND(reads_oldest);
  VTP_BIND(writes);
  VTP_BIND(overwrites);
  VTP_BIND(returns);
  VTP_BIND(leaves_to_one);
#undef VTP_BIND

  m.def("copies", copies);
  m.def("misaligned_copy", misaligned_copy);
  m.def("uninitialised", uninitialised);
  m.def("shared_overrun", shared_overrun, py::arg("by") = 1);
  m.def("dynamic_overrun", dynamic_overrun, py::arg("at") = 100);
  m.def("global_write", global_write);
  m.def("global_read", global_read);
  m.def("async_read", async_read);
  m.def("misaligned_load", misaligned_load);
  m.def("stack_overflow", stack_overflow);
  m.def("idle", idle, py::arg("grid_x") = 1, py::arg("grid_y") = 1, py::arg("block_x") = 1,
        py::arg("block_z") = 1, py::arg("dynamic_shared") = 0);
  m.def("large_static", large_static);
  m.def("static_and_dynamic", static_and_dynamic, py::arg("dynamic_shared"));
  m.def("throwing", throwing);
  m.def("trap", trap);
}

}  // namespace vtp::emulator
