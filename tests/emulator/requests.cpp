// Kernels whose memory traffic is known, for test_traffic.py: right ones, and wasteful ones that the
// counter must tell from them. One block of one warp each, unless said otherwise.
#ifdef VTP_EMULATOR_TRAFFIC

#include <memory>

#include "module.h"
#include "vtp/async_copy.cuh"
#include "vtp/cluster.cuh"
#include "vtp/mma.cuh"
#include "vtp/warp.cuh"

namespace py = pybind11;

namespace vtp::cuda {
namespace {

// Global memory that begins at a sector.
struct Memory {
  alignas(128) int x[2048] = {};
};

struct Words {
  int x[32 * 32];
};

struct alignas(16) Rows {
  int x[32 * 8];
};

// ---- Global memory ------------------------------------------------------------------------------

// Lane i reads int i * stride + offset and writes int i.
__global__ void strided_kernel(const int* in, int* out, int stride, int offset) {
  out[threadIdx.x] = in[threadIdx.x * stride + offset];
}

// Only lanes below `count` read.
__global__ void idle_lanes_kernel(const int* in, int* out, int count) {
  int x = 0;
  if (static_cast<int>(threadIdx.x) < count) x = in[threadIdx.x];
  out[threadIdx.x] = x;
}

struct TwoInts {
  int first, second;
};
struct alignas(8) AlignedTwoInts {
  int first, second;
};

template <class T>
__global__ void pairs_kernel(const T* in, T* out) {
  out[threadIdx.x] = in[threadIdx.x];
}

// Rounds of 32 ints; lanes below `late` skip the first one. With a meeting in every round they are
// in step again.
template <bool Meets>
__global__ void skipping_kernel(const int* in, int* out, int late) {
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (round > 0 || static_cast<int>(threadIdx.x) >= late) sum += in[round * 32 + threadIdx.x];
    if (Meets) __syncwarp();
  }
  __syncwarp();
  out[threadIdx.x] = sum;
}

// Every warp adds an int of its own, and one for all, to global memory.
__global__ void global_atomics_kernel(int* out) {
  if (lane_id() == 0) atomicAdd(out + 8 * warp_id(), 1);
  atomicAdd(out + 1024, 1);
}

// ---- Shared memory ------------------------------------------------------------------------------

// Lane i writes word i * stride, and reads it.
__global__ void banks_kernel(int* out, int stride) {
  VTP_SHARED(Words, words);
  words.x[threadIdx.x * stride] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = words.x[threadIdx.x * stride];
}

// All lanes read one word.
__global__ void shared_broadcast_kernel(int* out) {
  VTP_SHARED(Words, words);
  if (threadIdx.x == 0) words.x[5] = 1;
  __syncwarp();
  out[threadIdx.x] = words.x[5];
}

// Lane i reads 16 bytes, `stride` times 16 apart.
__global__ void wide_kernel(int* out, int stride) {
  VTP_SHARED(Rows, rows);
  rows.x[threadIdx.x] = 1;
  __syncwarp();
  const int4 row = *reinterpret_cast<const int4*>(&rows.x[threadIdx.x * 4 * stride]);
  out[threadIdx.x] = row.x;
}

// Lane i reads `count` words from 4 i on, one by one.
__global__ void merged_kernel(int* out, int count) {
  VTP_SHARED(Rows, rows);
  rows.x[threadIdx.x] = 1;
  __syncwarp();
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += rows.x[threadIdx.x * 4 + i];
  out[threadIdx.x] = sum;
}

// Lane i writes four words from 4 i on, field by field.
__global__ void fields_kernel(int* out) {
  VTP_SHARED(Rows, rows);
  const int i = threadIdx.x;
  int4* to = reinterpret_cast<int4*>(rows.x) + i;
  to->x = i;
  to->y = i + 1;
  to->z = i + 2;
  to->w = i + 3;
  __syncwarp();
  out[i] = rows.x[i];
}

// Lanes add to `words` different words, `stride` apart.
__global__ void shared_atomics_kernel(int* out, int words, int stride) {
  VTP_SHARED(Words, counts);
  counts.x[threadIdx.x] = 0;
  __syncwarp();
  atomicAdd(&counts.x[threadIdx.x % words * stride], 1);
  __syncwarp();
  out[threadIdx.x] = counts.x[threadIdx.x];
}

// 16 bytes a lane, from global memory to shared memory and, by way of registers, back.
__global__ void async_copy_kernel(const int* in, int* out, bool valid) {
  VTP_SHARED(Rows, rows);
  copy_async(&rows.x[threadIdx.x * 4], in + threadIdx.x * 4, valid);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  reinterpret_cast<int4*>(out)[threadIdx.x] = reinterpret_cast<const int4*>(rows.x)[threadIdx.x];
}

// Four matrices of 8 rows of 16 bytes, `stride` times 16 apart.
__global__ void matrix_load_kernel(int* out, int stride) {
  VTP_DYNAMIC_SHARED(bytes);
  uint32_t matrices[4];
  load_matrices(matrices, bytes + 16 * stride * threadIdx.x);
  out[threadIdx.x] = matrices[0];
}

// ---- Blocks and launches ------------------------------------------------------------------------

// Every warp of every block reads the same 32 ints, twice, and writes ints of its own.
__global__ void shared_input_kernel(const int* in, int* out) {
  int sum = 0;
  for (int round = 0; round < 2; ++round) sum += in[(lane_id() + round) % kWarp];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Reads both, writes the second.
__global__ void second_kernel(const int* in, int* between, int* out) {
  const int i = threadIdx.x;
  out[i] = in[i] + between[i];
  between[i] = 0;
}

// Every block writes 32 words of its own and reads those of its neighbour in the cluster.
__global__ void cluster_kernel(int* out) {
  VTP_SHARED(Words, words);
  words.x[threadIdx.x] = threadIdx.x;
  cluster_sync();
  out[blockIdx.x * kWarp + threadIdx.x] =
      map_shared_rank(words.x, cluster_rank() ^ 1)[threadIdx.x];
  cluster_sync();
}

// Loads twice before a vote, not at all before another, once behind a barrier.
__global__ void phases_kernel(const int* in, int* out) {
  int x = in[threadIdx.x] + in[threadIdx.x + 64];
  x += __any_sync(kAllLanes, x);
  x += __any_sync(kAllLanes, x);
  __syncthreads();
  out[threadIdx.x] = x + in[threadIdx.x + 128];
}

// Two products of tensor cores between loads.
__global__ void products_kernel(const int* in, int* out) {
  float d[4] = {};
  for (int round = 0; round < 2; ++round) {
    const auto x = static_cast<uint32_t>(in[32 * round + lane_id()]);
    mma<__half>(d, {x, x, x, x}, {x, x});
  }
  out[threadIdx.x] = static_cast<int>(d[0]);
}

// Parameters, local arrays and tables.
struct Large {
  int x[64];
};
__constant__ int kTable[4] = {1, 2, 3, 4};

__global__ void no_traffic_kernel(Large large, int* out, int at) {
  volatile int local[8];
  for (int i = 0; i < 8; ++i) local[i] = large.x[(at + i) % 64] + kTable[(at + i) % 4];
  if (local[at % 8] == -1) out[0] = 1;
}

// One block.
template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), int threads,
         const Arguments&... arguments) {
  launch(name, kernel, 1, threads, 0, nullptr, arguments...);
}

}  // namespace
}  // namespace vtp::cuda

namespace vtp::emulator {

void bind_requests(py::module_ m) {
  using namespace vtp::cuda;
  static const std::unique_ptr<Memory> input(new Memory), output(new Memory), third(new Memory);
  static int *const in = input->x, *const out = output->x, *const between = third->x;

  m.def("strided", [](int stride, int offset) {
    run("strided", strided_kernel, 32, in, out, stride, offset);
  });
  m.def("idle_lanes", [](int count) {
    run("idle_lanes", idle_lanes_kernel, 32, in, out, count);
  });
  m.def("pairs", [](bool aligned) {
    if (aligned) {
      run("pairs", pairs_kernel<AlignedTwoInts>, 32, reinterpret_cast<AlignedTwoInts*>(in), reinterpret_cast<AlignedTwoInts*>(out));
    } else {
      run("pairs", pairs_kernel<TwoInts>, 32, reinterpret_cast<TwoInts*>(in),
             reinterpret_cast<TwoInts*>(out));
    }
  });
  m.def("skipping", [](bool meets, int late) {
    const auto kernel = meets ? skipping_kernel<true> : skipping_kernel<false>;
    run("skipping", kernel, 32, in, out, late);
  });
  m.def("global_atomics",
        [] { run("global_atomics", global_atomics_kernel, 64, out); });
  m.def("banks",
        [](int stride) { run("banks", banks_kernel, 32, out, stride); });
  m.def("shared_broadcast",
        [] { run("shared_broadcast", shared_broadcast_kernel, 32, out); });
  m.def("wide", [](int stride) { run("wide", wide_kernel, 32, out, stride); });
  m.def("merged", [](int count) { run("merged", merged_kernel, 32, out, count); });
  m.def("fields", [] { run("fields", fields_kernel, 32, out); });
  m.def("shared_atomics", [](int words, int stride) {
    run("shared_atomics", shared_atomics_kernel, 32, out, words, stride);
  });
  m.def("async_copy", [](bool valid) {
    run("async_copy", async_copy_kernel, 32, in, out, valid);
  });
  m.def("matrix_load", [](int stride) {
    cuda::launch("matrix_load", matrix_load_kernel, 1, 32, 16 * 32 * 8, nullptr, out, stride);
  });
  m.def("shared_input",
        [] { cuda::launch("shared_input", shared_input_kernel, 3, 64, 0, nullptr, in, out); });
  m.def("cluster", [] {
    cuda::launch(LaunchOptions{2}, "cluster", cluster_kernel, 4, 32, 0, nullptr, out);
  });
  m.def("chain", [] {
    run("first", strided_kernel, 32, in, between, 1, 0);
    run("second", second_kernel, 32, in, between, out);
  });
  m.def("phases", [] { run("phases", phases_kernel, 64, in, out); });
  m.def("products", [] { run("products", products_kernel, 32, in, out); });
  m.def("no_traffic",
        [] { run("no_traffic", no_traffic_kernel, 32, Large{}, out, 3); });
}

}  // namespace vtp::emulator

#endif
