"""compact_kv: rows of the keys and values of all layers in one launch (row_copy.py)."""

from collections.abc import Callable

from torch import Tensor

from .row_copy import Move, copy_rows, move_of, move_rows


def compact_kv(
    keys: list[Tensor], values: list[Tensor], indices: Tensor, counts: Tensor | None
) -> list[Tensor]:
    slots = indices.shape[-1]
    sources = [*keys, *values]
    targets = [x.new_empty(x.shape[0], x.shape[1], slots, x.shape[3]) for x in sources]
    _run(copy_rows, sources, targets, indices, counts)
    return targets


def compact_kv_(
    keys: list[Tensor], values: list[Tensor], indices: Tensor, counts: Tensor | None
) -> None:
    sources = [*keys, *values]
    _run(move_rows, sources, sources, indices, counts)


def _run(
    move: Callable[[list[Move], Tensor, Tensor | None], None],
    sources: list[Tensor],
    targets: list[Tensor],
    indices: Tensor,
    counts: Tensor | None,
) -> None:
    layers = len(sources) // 2 if indices.dim() > 2 else 1  # that have indices of their own
    moves = [
        move_of(x, to, i % layers)
        for i, (x, to) in enumerate(zip(sources, targets, strict=True))
        if to.numel() > 0
    ]
    if moves and indices.numel() > 0:
        heads = sources[0].shape[1]
        counts = None if counts is None else _by_head(counts, 0, heads)
        move(moves, _by_head(indices, 1, heads), counts)


def _by_head(x: Tensor, trailing: int, heads: int) -> Tensor:
    """[L, B, heads, ...] or, for all layers, [1, B, heads, ...] of `trailing` dimensions more."""
    if x.dim() == 1 + trailing:
        x = x[None]
    if x.dim() == 2 + trailing:
        x = x.unsqueeze(2)
    return x.expand(-1, -1, heads, *x.shape[3:])
