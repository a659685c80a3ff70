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


def why_not(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` cannot run `op` on tensors of that device and dtype, or None if it can."""
    if backend == "triton":
        return "this version has no Triton kernels"
    if backend == "native":
        return _why_not_native(op, torch.device(device), dtype)
    return None


def _why_not_native(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if _native.missing is not None:
        return _native.missing
    if (op, device.type) not in _native.kernels:
        return f"the native library has no {device.type.upper()} code for it"
    if device.type == "cpu":
        return None
    if dtype == torch.float64:
        return "float64 is served on the CPU and by the reference only"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _native.why_no_image(index)
    if reason is not None:
        archs = " ".join(_native.build["cuda_archs"])
        return f"none of the library's architectures ({archs}) runs on cuda:{index}: {reason}"
    return None


def choose(op: str, x: Tensor, backend: str | None) -> str:
    """The backend that runs `op` on tensors like `x`.

    Raises:
        ValueError: `backend`, or VTP_BACKEND, is not one of BACKENDS.
        NotImplementedError: it is, but cannot serve this tensor.
    """
    backend = backend or os.environ.get("VTP_BACKEND") or None
    if backend is None:
        return "native" if _why_not_native(op, x.device, x.dtype) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    reason = why_not(op, backend, x.device, x.dtype)
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
