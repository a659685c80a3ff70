"""Autotuning: which launch settings a kernel runs with, measured once per GPU and kind of input.

A kernel lists its few candidates, and of which arguments the best depends; lengths among these are
given as size classes, so that new lengths mean no new measurement. The choice is kept in memory and
in Triton's cache folder. Candidates must not change results but for the rounding of float sums, and
kernels that cannot run twice on the same tensors are not tuned.

Measuring waits for the GPU, so the first call of a kind cannot be captured in a CUDA graph: call
once before, as compiling asks for anyway.
"""

import os
from collections.abc import Callable, Iterable

import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where there is nothing to measure


def tuned(configs: Iterable[triton.Config], key: Iterable[str]) -> Callable:
    """Decorates a `triton.jit` kernel. Interpreted, it runs with the first of `configs`."""
    configs = list(configs)
    return triton.autotune(
        configs[:1] if INTERPRETED else configs, key=list(key), cache_results=True
    )


def size_class(size: int) -> int:
    """`size` rounded up to a power of four: what kernels are tuned for."""
    return 1 << (max(size - 1, 1).bit_length() + 1) // 2 * 2
