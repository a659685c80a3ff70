"""Argument checks shared by the ops: shapes, dtypes and devices, never values on a GPU.

Every error names the argument, what came and what was expected. A check costs about a microsecond
and does not wait for the device; ranges of indices are read on the CPU, on a GPU only in debug
mode.
"""

import torch
from torch import Tensor

from ._dispatch import FLOATS

ANY = -1  # a dimension of any size
BOOL = (torch.bool,)
INT64 = (torch.int64,)
INTS = (torch.int32, torch.int64)
MAX_HEAD_DIM = 256
MAX_SIZE = 2**31 - 2**16  # kernels count positions in int32, as csrc/torch_ops.h says

_debug = False


def debug(enabled: bool = True) -> None:
    """Turns checks that wait for the GPU on or off (off at first): of indices, and of numbers that
    must be finite."""
    global _debug
    _debug = bool(enabled)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fits(shape: torch.Size, sizes: tuple[int, ...]) -> bool:
    if len(shape) != len(sizes):
        return False
    for size, expected in zip(shape, sizes, strict=True):
        if expected not in (ANY, size):
            return False
    return True


def tensor(
    name: str,
    x: Tensor,
    layout: str,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Checks rank, sizes, dtype and device. `layout` is the shape in the words of the contract."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [{layout}], got {type(x).__name__}")
    shape = x.shape
    if shape != sizes and not _fits(shape, sizes):
        expected = ", ".join("*" if size == ANY else str(size) for size in sizes)
        raise ValueError(f"{name} must have shape [{layout}], here [{expected}], got {list(shape)}")
    for size in shape:
        if size > MAX_SIZE:
            raise ValueError(
                f"{name} must have at most {MAX_SIZE} entries in every dimension, got {list(shape)}"
            )
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_names((x.dtype,))}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def integer(name: str, x: int, minimum: int) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {x}")


def number(name: str, x: float) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")


def scale(x: float | None, head_dim: int) -> float:
    """The factor on the logits, D ** -0.5 unless one is given."""
    if x is None:
        return head_dim**-0.5
    number("scale", x)
    return float(x)


def one_of(name: str, x: str, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {x!r}")


def same_dtype(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        expected, got = _names((like.dtype,)), _names((x.dtype,))
        raise TypeError(f"{name} must have the dtype of {like_name}, {expected}, got {got}")


def heads(query: Tensor, key: Tensor) -> None:
    """Head counts and head dim of query [B, Hq, ..., D] and key [B, Hkv, S, D]."""
    query_heads, key_heads, dim = query.shape[1], key.shape[1], query.shape[-1]
    if key_heads == 0 or query_heads == 0 or query_heads % key_heads:
        raise ValueError(
            f"query must have a multiple of key's {key_heads} heads (at least one), "
            f"got {query_heads}"
        )
    if dim == 0:
        raise ValueError("query must have a head dim of at least 1, got 0")
    if dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"query must have a head dim of at most {MAX_HEAD_DIM}, got {dim}"
        )


def inference_only(op: str, *tensors: Tensor) -> None:
    """Refuses what autograd would follow: no op has a backward."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                raise NotImplementedError(
                    f"{op} has no backward, got an input that requires grad: "
                    "call it under torch.no_grad() or on detached tensors"
                )


def may_read(x: Tensor) -> bool:
    """Whether checks may read the values of x."""
    return (_debug or x.device.type == "cpu") and not torch.compiler.is_compiling()


def must_read(x: Tensor, backend: str) -> bool:
    """Whether checks of values come before the call: native code looks at them itself on the CPU,
    before it moves anything, and they are only repeated to say what was wrong."""
    return may_read(x) and not (backend == "native" and x.device.type == "cpu")


def row_indices(indices: Tensor, counts: Tensor | None, length: int) -> None:
    """Reads values: checks that the real indices ascend strictly within [0, length)."""
    width = indices.shape[-1]
    real = torch.ones_like(indices, dtype=torch.bool)
    if counts is not None:
        if bool(((counts < 0) | (counts > width)).any()):
            raise ValueError(f"counts must be within [0, {width}], got {counts.tolist()}")
        real = torch.arange(width, device=indices.device) < counts[..., None]
    outside = real & ((indices < 0) | (indices >= length))
    if bool(outside.any()):
        raise ValueError(
            f"indices must be within [0, {length}), got {indices[outside][0].item()} "
            f"at {outside.nonzero()[0].tolist()}"
        )
    descends = real[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
    if bool(descends.any()):
        raise ValueError(
            f"indices must ascend strictly within a row, they do not at "
            f"{descends.nonzero()[0].tolist()}"
        )


def distinct_rows(name: str, rows: Tensor, length: int) -> None:
    """Reads values: checks that rows are within [0, length), or -1, and none is named twice."""
    outside = (rows < -1) | (rows >= length)
    if bool(outside.any()):
        raise ValueError(
            f"{name} must be within [0, {length}), or -1 for padding, got "
            f"{rows[outside][0].item()} at {outside.nonzero()[0].tolist()}"
        )
    ordered = rows.sort(dim=1)[0]
    twice = (ordered[:, 1:] >= 0) & (ordered[:, 1:] == ordered[:, :-1])
    if bool(twice.any()):
        batch = int(twice.nonzero()[0, 0])
        raise ValueError(
            f"{name} must name no row twice, row {ordered[:, 1:][twice][0].item()} is there twice "
            f"in sequence {batch}"
        )
