// The Python module of the emulated kernels; that it is loaded also registers them with torch.
#include "module.h"

#include <pybind11/stl.h>

#include <map>
#include <string>

#include "emulator.h"

namespace py = pybind11;
using namespace vtp::emulator;

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
  bind_primitives(m.def_submodule("primitives"));
  bind_defects(m.def_submodule("defects"));
}
