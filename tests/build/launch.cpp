// What launch.cuh and cluster_launch.cuh ask of CUDA's runtime, here a stub. Says what is wrong, or
// nothing.
#include "vtp/cluster_launch.cuh"
#include "vtp/launch.cuh"
#include "vtp/wgmma_launch.cuh"

#include <cstdint>
#include <cstdio>
#include <cstdlib>

using namespace vtp::cuda;

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "launch: %s\n", what);
  std::exit(1);
}

void first(int64_t, const float*) {}
void second(int64_t, const float*) {}
void third() {}

void add(void* kernel, size_t static_shared, int architecture) {
  runtime.kernels[kernel] = {static_shared, architecture};
}

void run(void (*kernel)(int64_t, const float*), size_t dynamic_shared) {
  launch("kernel", kernel, dim3(2), dim3(32), dynamic_shared, nullptr, 7, nullptr);
}

template <class F>
std::string failure(const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

void check_arguments() {
  int64_t number = 0;
  runtime.run = [&](void** arguments) { number = *static_cast<int64_t*>(arguments[0]); };
  launch("kernel", first, dim3(3, 2), dim3(64), 16, nullptr, -5, nullptr);
  runtime.run = nullptr;
  const auto& launched = runtime.launches.back();
  require(number == -5, "arguments are not converted to the parameters' types");
  require(launched.config.gridDim.y == 2 && launched.config.blockDim.x == 64 &&
              launched.config.dynamicSmemBytes == 16 && launched.attributes.empty(),
          "a plain launch is not plain");
  const size_t before = runtime.launches.size();
  launch("kernel", first, dim3(0), dim3(64), 0, nullptr, 1, nullptr);
  require(runtime.launches.size() == before, "a grid without blocks was launched");
}

// `first` has 8 KB of static shared memory, `second` the same types of parameters and none.
void check_shared_memory() {
  run(first, 40 << 10);
  require(runtime.attributes_set == 0, "48 KB in all need not be asked for");
  run(first, (40 << 10) + 16);
  require(runtime.attributes_set == 1, "static and dynamic count together");
  run(second, 48 << 10);
  require(runtime.attributes_set == 1, "48 KB in all need not be asked for");
  run(first, 100 << 10);
  run(first, 90 << 10);
  const int read = runtime.attributes_read;
  run(first, 100 << 10);
  require(runtime.attributes_set == 2 && runtime.attributes_read == read, "asked more than once");
  runtime.device = 1;
  run(first, 90 << 10);
  require(runtime.attributes_set == 3, "each device is to be asked");
  runtime.device = 0;
  run(first, 219 << 10);
  require(contains(failure([] { run(first, 220 << 10); }), "kernel: invalid argument"),
          "more than there is passes");
  require(cudaGetLastError() == cudaSuccess, "an error is left behind");
  run(first, 219 << 10);
}

void check_clusters() {
  const LaunchOptions eight = {8};
  launch(eight, "kernel", first, dim3(16), dim3(32), 0, nullptr, 1, nullptr);
  const auto& attributes = runtime.launches.back().attributes;
  require(attributes.size() == 1 && attributes[0].id == cudaLaunchAttributeClusterDimension &&
              attributes[0].val.clusterDim.x == 8 && attributes[0].val.clusterDim.y == 1,
          "no cluster");
  require(architecture_of("kernel", third) == 80, "an architecture");
  require(contains(failure([&] { launch(eight, "old", third, 16, 32, 0, nullptr); }),
                   "old: clusters need code for compute capability 9.0"),
          "code without clusters is launched with them");
}

void check_clusters_at_once() {
  const auto at_once = [](void (*kernel)(int64_t, const float*)) {
    return clusters_at_once("kernel", kernel, 8, 512);
  };
  require(at_once(first) == 16 && at_once(first) == 16, "clusters of a device");
  require(runtime.clusters_read == 1, "asked more than once");
  runtime.device = 1;
  require(at_once(first) == 0 && at_once(first) == 0, "clusters for which there is no room");
  require(runtime.clusters_read == 2, "each device is to be asked, and once");
  runtime.device = 0;
  require(clusters_at_once("old", third, 8, 512) == 0 && runtime.clusters_read == 2,
          "clusters of code that has none");
}

void check_wgmma(bool wanted) {
  require(wgmma_is_on("kernel") == wanted, "products of a warpgroup on 9.0");
  for (const int other : {1, 2}) {
    runtime.device = other;
    require(!wgmma_is_on("kernel"), "products of a warpgroup on another device than 9.0");
  }
  runtime.device = 0;
}

void check_dependent_launches(bool wanted) {
  const auto is_dependent = [] {
    const auto& attributes = runtime.launches.back().attributes;
    return attributes.size() == 1 &&
           attributes[0].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
           attributes[0].val.programmaticStreamSerializationAllowed == 1;
  };
  OpStream stream(nullptr);
  launch("kernel", first, dim3(0), dim3(32), 0, stream, 1, nullptr);
  launch("kernel", first, dim3(1), dim3(32), 0, stream, 1, nullptr);
  require(runtime.launches.back().attributes.empty(), "the first kernel is not launched plainly");
  launch("kernel", second, dim3(1), dim3(32), 0, stream, 1, nullptr);
  require(is_dependent() == wanted, "the second kernel");
  launch("kernel", third, dim3(1), dim3(32), 0, stream);
  require(runtime.launches.back().attributes.empty(), "old code is launched to wait by itself");
  launch(LaunchOptions{2}, "kernel", first, dim3(2), dim3(32), 0, stream, 1, nullptr);
  require(runtime.launches.back().attributes.size() == (wanted ? 2 : 1), "both attributes");
  launch("kernel", first, dim3(1), dim3(32), 0, nullptr, 1, nullptr);
  require(runtime.launches.back().attributes.empty(), "a kernel by itself depends on another");
}

}  // namespace

// launch <whether dependent launches are on: 0 or 1> <whether products of a warpgroup are>
int main(int, char** arguments) {
  add(reinterpret_cast<void*>(first), 8 << 10, 90);
  add(reinterpret_cast<void*>(second), 0, 90);
  add(reinterpret_cast<void*>(third), 0, 80);
  check_arguments();
  check_shared_memory();
  check_clusters();
  check_clusters_at_once();
  check_dependent_launches(arguments[1][0] == '1');
  check_wgmma(arguments[2][0] == '1');
}
