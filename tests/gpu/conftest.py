"""Tests of what only a GPU can show. All of them are marked `gpu`; without a GPU, or without CUDA
code in the native library, they are skipped and say why.

The ops' results over the whole matrix of inputs are no matter of this folder: tests/ops runs on
CUDA tensors, too, wherever there is a GPU.
"""

from pathlib import Path

import pytest
import torch

from vtp_kernels.ops._dispatch import why_not

HERE = Path(__file__).parent


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
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    """Where `draw` puts its tensors."""
    return "cuda"


@pytest.fixture(autouse=True)
def finished():
    """An error of the device shows in the test that made it, not in a later one."""
    yield
    torch.cuda.synchronize()
