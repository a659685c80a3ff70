"""The order of scores as integers: a larger key is a better score."""

import triton
import triton.language as tl

ABSENT = tl.constexpr(0)  # takes no part
KEPT = tl.constexpr(0xFFFFFFFF)  # is taken whatever the others


@triton.jit
def sortable(score):
    """uint32 keys of float32 scores, between ABSENT and KEPT: -0.0 as +0.0, NaN below -inf."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score != score, 1, key)
