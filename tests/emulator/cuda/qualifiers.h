// CUDA's words before declarations. There is no __shared__: an object per block takes more than a
// qualifier, see VTP_SHARED. (__noinline__ is left to the compiler: libstdc++ uses the name.)
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
