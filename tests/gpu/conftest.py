"""Tests of what only a GPU can show. All of them are marked `gpu`; without a GPU, or without CUDA
code in the native library, they are skipped and say why.

In a rehearsal (VTP_GPU_REHEARSAL=1, by `benchmarks.gpu_check --rehearse`) those files run on the
CPU that ask nothing of a GPU but its kernels: on the emulator, or where it cannot be built on the
CPU's kernels. Such a file says REHEARSED = True.

The ops' results over the whole matrix of inputs are no matter of this folder: tests/ops runs on
CUDA tensors, too, wherever there is a GPU.
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from emulator import serving
from vtp_kernels.ops._dispatch import why_not

HERE = Path(__file__).parent
REHEARSAL = os.environ.get("VTP_GPU_REHEARSAL") == "1"


def why_skip() -> str | None:
    """Why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device: torch sees none"
    reason = why_not("select_topk", "native", "cuda")
    return None if reason is None else f"needs CUDA kernels: {reason}"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    reason = why_skip()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            rehearsed = REHEARSAL and getattr(item.module, "REHEARSED", False)
            if reason is not None and not rehearsed:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    """Where `draw` puts its tensors."""
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(autouse=True)
def finished():
    """An error of the device shows in the test that made it, not in a later one."""
    emulated = REHEARSAL and serving.why_not() is None
    with serving.serving() if emulated else contextlib.nullcontext():
        yield
    if not REHEARSAL:
        torch.cuda.synchronize()
