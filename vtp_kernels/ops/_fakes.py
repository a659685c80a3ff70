"""The shape functions of the ops: what torch.compile runs in their place."""

from collections.abc import Callable

import torch

from vtp_kernels import _native

#: By op.
fakes: dict[str, Callable] = {}


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Registers the shape function of an op with the loaded library, if that defines the op, and
    keeps it for the Triton kernels."""

    def register(function: Callable) -> Callable:
        fakes[op] = function
        if _native.defines(op):
            torch.library.register_fake(f"vtp_kernels::{op}")(function)
        return function

    return register
