"""One engine for all tests that need no settings of their own: it is what takes time."""

import asking
import pytest


@pytest.fixture(scope="session")
def engine():
    """Started without a budget: requests bring theirs."""
    return asking.llm()
