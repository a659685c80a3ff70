"""Every op on every path of its kernels, on inputs small enough for compute-sanitizer.

`python -m benchmarks.gpu_check` runs this file first, and under memcheck, racecheck, initcheck and
synccheck. Lengths stand just before, on and past a warp, a tile and a block of threads.
"""

import pytest
from variants import LONG, VARIANTS

REHEARSED, EMULATED = ("test_",), True


@pytest.mark.parametrize("length", (1, 31, 64, 65, 200))
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_the_reference(draw, variant, length):
    arguments = variant.draw(draw, length, batch=2)
    variant.check(arguments, variant.run(arguments))


@pytest.mark.parametrize("variant", LONG, ids=str)
def test_more_tokens_than_a_block_holds(draw, variant):
    arguments = variant.draw(draw, 17_000, batch=2)
    variant.check(arguments, variant.run(arguments))
