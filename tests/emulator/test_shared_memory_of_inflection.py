"""Where `inflection` sorts a row follows from what the device has; what comes out does not."""

import math

import pytest
import torch

from vtp_kernels import reference

SCRATCH = 9136  # bytes of static shared memory, as csrc/code_generation.md lists them
PLACES = {True: "inflection: long", False: "inflection: longest"}


@pytest.mark.parametrize(
    "length, limit, in_shared",
    [
        (8193, 64 << 10, False),  # 7.5
        (8193, (64 << 10) + SCRATCH - 1, False),
        (8193, (64 << 10) + SCRATCH, True),
        (16384, 99 << 10, True),  # 8.6, 8.9, 12.0
        (16385, 99 << 10, False),
        (32768, 163 << 10, True),  # 8.0
        (32769, 227 << 10, False),  # 9.0, 10.0
    ],
)
def test_long_rows_are_sorted_in_shared_memory_where_it_is_enough(
    kernels, set_shared_limit, draw, length, limit, in_shared
):
    set_shared_limit(limit)
    curve = draw.normal(1, length).exp()
    for special in (math.nan, math.inf):
        curve[draw.bools(1, length, p=0.01)] = special
    for rule in ("chord", "iqr", "mass"):
        before = kernels.launches()
        got = torch.ops.vtp_kernels_emulated.inflection(curve, rule, 1, None, 1.0, 1.0, 0.5)
        after = kernels.launches()
        for place, name in PLACES.items():
            assert after.get(name, 0) - before.get(name, 0) == (place == in_shared)
        want = reference.inflection(curve, rule=rule, clip_quantile=1.0, mass=0.5)
        assert torch.equal(got[0], want.indices) and torch.equal(got[1], want.counts)
