"""Every op's result has the same bits in whatever order threads and blocks run."""

import re

import pytest
import torch

from emulator import build, cases


def bits(tensors):
    return [x.contiguous().view(-1).view(torch.uint8) for x in tensors]


@pytest.mark.parametrize("op", cases.OPS)
def test_results_do_not_depend_on_the_order_of_threads(
    kernels, set_order, set_shared_limit, draw, op
):
    set_shared_limit(cases.SHARED_BYTES)
    seed = draw.integer(0, 2**31)
    results = {}
    for order in build.ORDERS:
        set_order(order)
        results[order] = [(case, bits(cases.run(kernels, case))) for case in cases.cases(op, seed)]
    for order in build.ORDERS[1:]:
        for (case, first), (_, other) in zip(results["forward"], results[order], strict=True):
            assert all(map(torch.equal, first, other)), (order, case)


def test_every_kernel_is_reached(kernels):
    """By the tests above: this one comes after them."""
    sources = "".join(path.read_text() for path in build.kernel_sources())
    named = set(re.findall(r'\blaunch\([^";]*"([^"]+)"', sources))
    assert named and named <= set(kernels.launches())
