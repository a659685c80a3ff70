"""Registers launchers as `torch.ops.vtp_kernels_triton.<op>`, which torch.compile can call."""

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl

from vtp_kernels.ops._fakes import fakes

_library = torch.library.Library("vtp_kernels_triton", "DEF")


def register(launcher: Callable, mutates: Iterable[str] = ()) -> None:
    """Makes an op of a launcher: its name, and its schema from the annotations.

    `mutates` names the arguments that are written to. The shape function is that of the native op
    of the same name.
    """
    op = launcher.__name__
    _library.define(op + torch.library.infer_schema(launcher, mutates_args=tuple(mutates)))
    _library.impl(op, _on_its_device(launcher), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vtp_kernels_triton::{op}", fakes[op], lib=_library)


def _on_its_device(launcher: Callable) -> Callable:
    """Triton launches on the current device: that of the first tensor has to be it."""

    @functools.wraps(launcher)
    def launch(*args, **kwargs):
        with device_of(args[0] if isinstance(args[0], torch.Tensor) else args[0][0]):
            return launcher(*args, **kwargs)

    return launch


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def _probe(out, value):
    tl.store(out, value)


def probe(device: torch.device) -> None:
    """Compiles and runs a kernel on `device`. Raises if that does not work."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with device_of(out):
        _probe[(1,)](out, 1)
