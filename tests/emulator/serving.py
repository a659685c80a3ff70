"""The CUDA kernels on the emulator, in place of the native CPU kernels."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from emulator import build
from vtp_kernels import _native


def why_not() -> str | None:
    """Why the emulated kernels cannot serve here, or None if they can."""
    return _native.missing or build.why_not()


@contextlib.contextmanager
def serving(architecture: int = 90, variant: str = "plain") -> Iterator[None]:
    """While open, torch.ops.vtp_kernels.* on CPU tensors run the CUDA kernels' unchanged source, as
    compiled for the architecture."""
    kernels = build.load(variant)
    with torch.library._scoped_library("vtp_kernels", "IMPL") as library:
        with warnings.catch_warnings():  # of a kernel being overridden, as it should be
            warnings.simplefilter("ignore")
            for op in _native.OPS:
                library.impl(op, getattr(torch.ops.vtp_kernels_emulated, op).default, "CPU")
        with build.architecture(kernels, architecture):
            yield
