"""The emulated kernels, and the orders their threads may run in."""

import pytest

from emulator import build


@pytest.fixture(scope="session")
def kernels():
    """The extension module; skips where it cannot be built."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    return build.load("plain")


@pytest.fixture
def set_shared_limit(kernels):
    """A function that changes how much shared memory a block may have, which is put back."""
    yield kernels.set_shared_limit
    kernels.set_shared_limit(64 << 10)


@pytest.fixture
def set_order(kernels, draw):
    """A function that changes the thread order, which is put back afterwards."""
    before = kernels.order()
    yield lambda order: kernels.set_order(order, draw.integer(0, 2**31))
    kernels.set_order(before)


@pytest.fixture(params=build.ORDERS)
def order(request, set_order):
    """Each of the thread orders, in force."""
    set_order(request.param)
    return request.param
