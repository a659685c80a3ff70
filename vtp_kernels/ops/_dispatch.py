"""Which backend serves a call.

`backend=None` takes the fastest that can serve the tensor's device and dtype: native, else Triton,
else the reference. The environment variable VTP_BACKEND replaces None; an explicit argument wins
over both. A backend that is asked for and cannot serve raises, it is never replaced silently.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from vtp_kernels import _native, _triton
from vtp_kernels._shown import shown

BACKENDS = ("native", "triton", "reference")
_NAMESPACES = {"native": torch.ops.vtp_kernels, "triton": torch.ops.vtp_kernels_triton}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT64 = "float64 is served by the reference, and on the CPU by the native library"


def why_not(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` cannot run `op` on tensors of that device and dtype, or None if it can."""
    return _why_not(op, backend, torch.device(device), dtype)


def _why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if backend == "triton":
        return _why_not_triton(op, device, dtype)
    if backend == "native":
        return _why_not_native(op, device, dtype)
    return None


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if op in _triton.WITHOUT:
        return "there is no Triton kernel for it"
    if dtype == torch.float64:
        return FLOAT64
    return _triton.why_not("cpu" if device.type == "cpu" else f"{device.type}:{_index(device)}")


def _why_not_native(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if _native.missing is not None:
        return _native.missing
    if (op, device.type) not in _native.kernels:
        return f"the native library has no {device.type.upper()} code for it"
    if device.type == "cpu":
        return None
    if dtype == torch.float64:
        return FLOAT64
    index = _index(device)
    reason = _native.why_no_image(index)
    if reason is not None:
        archs = " ".join(_native.build["cuda_archs"])
        return f"none of the library's architectures ({archs}) runs on cuda:{index}: {reason}"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def default_backends(device: torch.device) -> tuple[str, ...]:
    """What is taken if it can serve, the fastest first. Interpreted Triton has to be asked for."""
    return ("native", "reference") if device.type == "cpu" else BACKENDS


def choose(op: str, x: Tensor, backend: str | None) -> str:
    """The backend that runs `op` on tensors like `x`.

    Raises:
        ValueError: `backend`, or VTP_BACKEND, is not one of BACKENDS.
        NotImplementedError: it is, but cannot serve this tensor.
    """
    backend = backend or os.environ.get("VTP_BACKEND") or None
    if backend is None:
        device, dtype = x.device, x.dtype
        for default in default_backends(device):
            if _why_not(op, default, device, dtype) is None:
                return default
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {shown(backend)}")
    reason = why_not(op, backend, x.device, x.dtype)
    if reason is not None:
        raise NotImplementedError(
            f"{op}: backend {backend!r} cannot serve {x.device.type} tensors: {reason}"
        )
    return backend


def kernel(op: str, backend: str) -> Callable:
    """The registered op of a backend other than the reference."""
    return getattr(_NAMESPACES[backend], op).default


def score_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores computed from x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rowwise(x: Tensor | None) -> Tensor | None:
    """x with stride 1 in its last dimension, as native code reads it: a copy only if need be."""
    return x if x is None or x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()
