// The parts of the Python module that exist for the tests of the emulator.
#pragma once

#include <pybind11/pybind11.h>

namespace vtp::emulator {

void bind_primitives(pybind11::module_ module);  // building blocks of kernels, one by one
void bind_defects(pybind11::module_ module);     // kernels with a planted mistake
// Products of a warpgroup; with planted mistakes they are defects too.
void bind_warpgroup(pybind11::module_ module, pybind11::module_ defects);
void bind_requests(pybind11::module_ module);    // kernels whose memory traffic is known

}  // namespace vtp::emulator
