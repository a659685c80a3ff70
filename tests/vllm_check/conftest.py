"""One engine for all tests that need no settings of their own: starting one is what takes time."""

import pytest


@pytest.fixture(scope="session")
def engine():
    """Started without a budget: requests bring theirs."""
    import asking

    return asking.llm()
