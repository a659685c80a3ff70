// Stands in for CUDA's header of this name: the part of it that kernels and their launchers use.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"
#include "atomics.h"
#include "collectives.h"
#include "intrinsics.h"
#include "qualifiers.h"
#include "runtime_api.h"
#include "vector_types.h"

inline const uint3& threadIdx = vtp::emulator::position.thread;
inline const uint3& blockIdx = vtp::emulator::position.block;
inline const dim3& blockDim = vtp::emulator::position.block_size;
inline const dim3& gridDim = vtp::emulator::position.grid_size;
constexpr int warpSize = 32;
