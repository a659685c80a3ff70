"""Fixtures of the tests of models."""

import pytest
import torch.distributed as dist


@pytest.fixture
def alone():
    """A group of processes with nobody else in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
