"""Fixtures shared by all tests: fresh random inputs, and one run per backend this machine has.

A test that takes `backend` (and `device`) runs once for every backend that can serve the module's
`OP`, on the CPU and on a GPU where there is one. Adding a backend adds no test code. The CUDA
kernels run on any machine: under the id "emulated", the native backend's CPU calls go to their
unchanged source on the emulator of tests/emulator, and under "emulated-sm_80" to the kernels that
older GPUs get in the place of some. That checks their logic, not a GPU. Triton does
the same for its kernels in a process of its own, with TRITON_INTERPRET=1: "cpu-triton".

Inputs differ from run to run. A failure prints the seed; VTP_TEST_SEED=<seed> repeats the run.
"""

import os
import secrets
import zlib

# The tests take one thread, and so does every process they start. Threads wait for each other in
# loops, and where another process is on the same cores everything takes ten times as long. Torch
# reads these as it is loaded. OMP_NUM_THREADS from outside holds; such threads sleep as they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from backends import INTERPRETED, runs
from emulator import serving

if INTERPRETED:
    from triton_kernels import interpreter

    interpreter.install()
SEED = int(os.environ.get("VTP_TEST_SEED") or secrets.randbits(32))


def pytest_addoption(parser):
    parser.addoption(
        "--every-family",
        action="store_true",
        help="the long tests of model families for each of them, not only those that differ most",
    )


def pytest_report_header():
    return f"VTP_TEST_SEED={SEED}"


def pytest_generate_tests(metafunc):
    op = getattr(metafunc.module, "OP", None)
    if op is None or "backend" not in metafunc.fixturenames:
        return
    metafunc.parametrize("device, backend, emulated", runs(op), indirect=["emulated"])


def pytest_collection_modifyitems(config, items):
    """GPU kernels do not serve float64: nothing to test, rather than a skip in every report."""

    def is_served(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        on_gpu = parameters.get("emulated") or parameters.get("device") == "cuda"
        backend = parameters.get("backend")
        of_gpu = backend == "triton" or (backend == "native" and on_gpu)
        return not (of_gpu and parameters.get("dtype") == torch.float64)

    left_out = [item for item in items if not is_served(item)]
    items[:] = [item for item in items if is_served(item)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def emulated(request):
    """Whether native CPU calls run the CUDA kernels on the emulator, as they then do."""
    if not getattr(request, "param", False):
        yield False
        return
    with serving.serving(request.param):
        yield True


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
