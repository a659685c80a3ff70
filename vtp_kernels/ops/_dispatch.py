"""Which backend serves a call.

`backend=None` takes the fastest that can serve the tensor's device and dtype: native, else Triton,
else the reference. The environment variable VTP_BACKEND replaces None; an explicit argument wins
over both. A backend that is asked for and cannot serve raises, it is never replaced silently.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from vtp_kernels import _native

BACKENDS = ("native", "triton", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run `op` on tensors of that device type, or None if it can."""
    if backend == "triton":
        return "this version has no Triton kernels"
    if backend == "native":
        if _native.missing is not None:
            return _native.missing
        if (op, device_type) not in _native.kernels:
            return f"the native library has no {device_type.upper()} code for it"
    return None


def choose(op: str, x: Tensor, backend: str | None) -> str:
    """The backend that runs `op` on tensors like `x`.

    Raises:
        ValueError: `backend`, or VTP_BACKEND, is not one of BACKENDS.
        NotImplementedError: it is, but cannot serve this tensor.
    """
    backend = backend or os.environ.get("VTP_BACKEND") or None
    if backend is None:
        return "native" if (op, x.device.type) in _native.kernels else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    reason = why_not(op, backend, x.device.type)
    if reason is not None:
        raise NotImplementedError(
            f"{op}: backend {backend!r} cannot serve {x.device.type} tensors: {reason}"
        )
    return backend


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Registers the shape function of a native op, if the loaded library defines the op."""

    def register(function: Callable) -> Callable:
        if _native.defines(op):
            torch.library.register_fake(f"vtp_kernels::{op}")(function)
        return function

    return register


def score_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores computed from x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rowwise(x: Tensor | None) -> Tensor | None:
    """x with stride 1 in its last dimension, as native code reads it: a copy only if need be."""
    return x if x is None or x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()
