"""Fixtures shared by all tests: fresh random inputs, and one run per backend this machine has.

A test that takes `backend` (and `device`) runs once for every backend that can serve the module's
`OP`, on the CPU and on a GPU where there is one. Adding a backend adds no test code.

Inputs differ from run to run. A failure prints the seed; VTP_TEST_SEED=<seed> repeats the run.
"""

import os
import secrets
import zlib

import pytest
import torch

from vtp_kernels.ops._dispatch import BACKENDS, why_not

SEED = int(os.environ.get("VTP_TEST_SEED") or secrets.randbits(32))


def pytest_report_header():
    return f"VTP_TEST_SEED={SEED}"


def pytest_generate_tests(metafunc):
    op = getattr(metafunc.module, "OP", None)
    if op is None or "backend" not in metafunc.fixturenames:
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    pairs = [
        pytest.param(
            device,
            backend,
            id=f"{device}-{backend}",
            marks=pytest.mark.gpu if device == "cuda" else (),
        )
        for device in devices
        for backend in BACKENDS
        if why_not(op, backend, device) is None
    ]
    metafunc.parametrize("device, backend", pairs)


class Draw:
    """Random tensors on one device from one seeded generator."""

    def __init__(self, seed: int, device: str):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(
            self.device, dtype
        )

    def uniform(self, *shape, dtype=torch.float32):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(
            self.device, dtype
        )

    def bools(self, *shape, p=0.5):
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)

    def integers(self, low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def integer(self, low, high):
        return int(self.integers(low, high, 1))

    def rows(self, batch, length, width):
        """Indices int64 [batch, width] ascending with tail -1, counts int32 [batch] at random."""
        counts = self.integers(0, min(width, length) + 1, batch, dtype=torch.int32)
        indices = torch.full((batch, width), -1, dtype=torch.int64, device=self.device)
        for b, count in enumerate(counts.tolist()):
            chosen = torch.randperm(length, generator=self.generator)[:count].sort()[0]
            indices[b, :count] = chosen.to(self.device)
        return indices, counts


@pytest.fixture
def device():
    """The CPU, unless the test is parametrised by backend."""
    return "cpu"


@pytest.fixture
def draw(request, device):
    seed = (SEED + zlib.crc32(request.node.nodeid.encode())) % 2**32
    print(f"VTP_TEST_SEED={SEED}")  # pytest shows it with a failure
    return Draw(seed, device)
