"""Tests of what only a GPU can show. All of them are marked `gpu`; without a GPU, or without CUDA
code in the native library, they are skipped and say why.

In a rehearsal (VTP_GPU_REHEARSAL=1, by `benchmarks.gpu_check --rehearse`) tests run on the CPU
whose names begin as their file's REHEARSED says: on the kernels of the CPU, with cpu_device in the
place of torch.cuda; those of EMULATED files on the emulator, where it can be built.

The ops' results over the whole matrix of inputs are no matter of this folder: tests/ops runs on
CUDA tensors, too, wherever there is a GPU.
"""

import contextlib
import os
from pathlib import Path

import cpu_device
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
            names = getattr(item.module, "REHEARSED", ()) if REHEARSAL else ()
            rehearsed = item.name.startswith(names)
            if reason is not None and not rehearsed:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    """Where `draw` puts its tensors."""
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(autouse=True)
def finished(request, monkeypatch):
    """An error of the device shows in the test that made it, not in a later one."""
    with contextlib.ExitStack() as open_until_the_end:
        if REHEARSAL:
            open_until_the_end.enter_context(cpu_device.installed(monkeypatch))
            if getattr(request.module, "EMULATED", False) and serving.why_not() is None:
                open_until_the_end.enter_context(serving.serving())
        yield
        torch.cuda.synchronize()
