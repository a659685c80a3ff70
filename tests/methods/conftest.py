"""Methods that tests define are gone after them."""

import pytest

from vtp_kernels.methods import METHODS


@pytest.fixture
def methods():
    """The registry of methods, put back as it was in the end."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)
