"""compact_rows: rows of all tensors in one launch (row_copy.py)."""

from torch import Tensor

from .row_copy import copy_rows, move_of


def compact_rows(
    tensors: list[Tensor], indices: Tensor, counts: Tensor | None, align: str
) -> list[Tensor]:
    out = [x.new_empty(*indices.shape, *x.shape[2:]) for x in tensors]
    sources = [_dense_rows(x)[:, None] for x in tensors]  # copies have to outlive the launch
    moves = [move_of(x, to, 0) for x, to in zip(sources, out, strict=True) if to.numel() > 0]
    if moves:
        counts = None if counts is None else counts[None, :, None]
        copy_rows(moves, indices[None, :, None], counts, align == "right")
    return out


def _dense_rows(x: Tensor) -> Tensor:
    """x without gaps within its rows."""
    elements = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != elements:
            return x.contiguous()
        elements *= size
    return x
