// The Python module of the emulated kernels; that it is loaded also registers them with torch.
#include "module.h"

#include <pybind11/stl.h>

#include <map>
#include <string>

#include "emulator.h"
#include "traffic.h"

namespace py = pybind11;
using namespace vtp::emulator;
using namespace py::literals;

#ifdef VTP_EMULATOR_TRAFFIC
namespace {

py::list take_traffic() {
  py::list launches;
  for (const traffic::Launch& x : traffic::take()) {
    py::list requests;
    for (const traffic::Requests& r : x.requests) {
      const char* const access = r.access == Access::read    ? "load"
                                 : r.access == Access::write ? "store"
                                                             : "atomic";
      requests.append(py::dict("place"_a = r.place, "access"_a = access, "shared"_a = r.shared,
                               "bytes"_a = r.bytes, "count"_a = r.count, "lanes"_a = r.lanes,
                               "units"_a = r.units, "ideal"_a = r.ideal, "most"_a = r.most));
    }
    launches.append(py::dict("name"_a = x.name, "blocks"_a = x.blocks, "threads"_a = x.threads,
                             "cold_reads"_a = x.cold_reads, "first_writes"_a = x.first_writes,
                             "passed_on"_a = x.passed_on, "block_reads"_a = x.block_reads,
                             "barriers"_a = x.barriers, "collectives"_a = x.collectives,
                             "load_phases"_a = x.load_phases, "requests"_a = requests));
  }
  return launches;
}

}  // namespace
#endif

PYBIND11_MODULE(vtp_kernels_emulated, m) {
  m.def(
      "set_order",
      [](const std::string& order, uint64_t seed) { set_order(order_named(order), seed); },
      py::arg("order"), py::arg("seed") = 1,
      "Threads and blocks run forward, reverse or random from now on.");
  m.def(
      "order", [] { return std::string(name_of(multiprocessor.order())); },
      "The thread order in force.");
  m.def(
      "set_shared_limit", [](size_t bytes) { multiprocessor.set_shared_limit(bytes); },
      py::arg("bytes"), "How much shared memory a block may have, 64 KB unless set.");
  m.def(
      "set_architecture", [](int architecture) { multiprocessor.set_architecture(architecture); },
      py::arg("architecture"), "What kernels count as compiled for, 90 unless set.");
  m.def(
      "architecture", [] { return multiprocessor.architecture(); },
      "What kernels count as compiled for.");
  m.def(
      "shared_limit", [] { return multiprocessor.shared_limit(); },
      "How much shared memory a block may have.");
  m.def(
      "launches", [] { return multiprocessor.launches(); },
      "How often each kernel has been launched, by name.");
  m.def(
      "switches", [] { return multiprocessor.switches(); },
      "How often one thread has made way for another.");
  m.def("barriers", &races::barriers, "Where barriers were met, \"file:line\"; by races builds.");
  m.def("forget_barriers", &races::forget_barriers, "From here on barriers() begins anew.");
  m.def("ignore_barrier", &races::ignore_barrier, py::arg("site"),
        "Takes the barriers there for none when looking for races; \"\" for no such place.");
#ifdef VTP_EMULATOR_TRAFFIC
  m.def("take_traffic", &take_traffic,
        "The launches since the last call, and what they asked of memory.");
  m.def("source", &accesses::source, py::arg("place"), "The source line of a place in the code.");
  bind_requests(m.def_submodule("requests"));
#endif
  py::module_ primitives = m.def_submodule("primitives"), defects = m.def_submodule("defects");
  bind_primitives(primitives);
  bind_defects(defects);
  bind_warpgroup(primitives, defects);
}
