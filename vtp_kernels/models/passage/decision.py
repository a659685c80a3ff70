"""What a method decides, and whether that can be carried out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.counts import added, on_device
from vtp_kernels.contract.facts import Fact, asked_stay, check_fit, demand, equal, host_counts
from vtp_kernels.contract.groups import marked
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.rows import KINDS, Kept, PromptRows
from vtp_kernels.ops import _checks
from vtp_kernels.ops._checks import ANY, INT64, INTS, tensor

__all__ = ["decision"]


def decision(method: Method, layer: int, rows: PromptRows) -> Kept | None:
    """What `method` answers before `layer`. Raises TypeError or ValueError naming both if that
    cannot be carried out; what the host cannot know of it stops the GPU."""
    rows.asker = f"{type(method).__name__}.decide before layer {layer}"
    if rows.vision is not None:
        rows.vision.asker = rows.asker
    kept = method.decide(layer, rows)
    if kept is not None and not any(kept is own for own in rows.made):
        _check_kind(rows.asker, kept)
        _check_shapes(kept, rows)
        _check_rows(kept, rows)
    return kept


def _check_kind(where: str, kept: Any) -> None:
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        raise TypeError(
            f"{where}: expected a Kept or None, got {shown(kept)}: give a mask to "
            "rows.keep_rows(mask)"
        )
    if not isinstance(kept, Kept):
        raise TypeError(f"{where}: expected a Kept or None, got {shown(kept)}")
    if not isinstance(kept.selection, tuple) or len(kept.selection) != 2:
        raise TypeError(f"{where}: selection: expected a Selection, got {shown(kept.selection)}")


def _check_shapes(kept: Kept, rows: PromptRows) -> None:
    """Shapes and dtypes, and what the host knows of the counts."""
    where, (batch, width), device = rows.asker, rows.visual.shape, rows.visual.device
    indices, counts = kept.selection
    tensor(f"{where}: selection.indices", indices, "B, K", (batch, ANY), INT64, device)
    tensor(f"{where}: selection.counts", counts, "B", (batch,), INTS, device)
    capacity = indices.shape[1]
    if capacity > width:
        raise ValueError(f"{where}: selection: {capacity} rows of {width}")
    for what, x, there in zip(KINDS, kept[1:3], (rows.text_now, rows.visual_now), strict=True):
        if isinstance(x, Tensor):
            tensor(f"{where}: counts of {what}", x, "B", (batch,), INTS, device)
        else:
            check_fit(where, what, host_counts(f"{where}: counts of {what}", x, batch), there)
    if kept.hidden is not None:
        hidden = rows.hidden
        what = f"{where}: hidden"
        tensor(what, kept.hidden, "B, S, C", tuple(hidden.shape), (hidden.dtype,), device)
    totals = added(kept.text, kept.visual)
    if totals is not None and max(totals) > capacity:
        raise ValueError(
            f"{where}: selection: room for {capacity} rows, and counts say {max(totals)}"
        )


def _check_rows(kept: Kept, rows: PromptRows) -> None:
    """That the rows of a selection are there and ascend, and that counts are theirs."""
    where, width, (indices, counts) = rows.asker, rows.visual.shape[1], kept.selection
    if _checks.may_read(indices):
        try:
            _checks.row_indices(indices, counts, width)
        except ValueError as error:
            raise ValueError(f"{where}: selection.{error}") from error
    real = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    there = ~real | ((indices >= 0) & (indices < width))
    ascend = ~real[:, 1:] | (indices[:, 1:] > indices[:, :-1])
    stays = marked(torch.where(real, indices, -1), width)
    if rows.valid is not None:
        stays = stays & rows.valid
    text, visual = (
        x if isinstance(x, Tensor) else on_device(list(x), indices.device) for x in kept[1:3]
    )
    *found, asked = rows.numbers_of(stays)
    demand(
        where,
        Fact(there.all(1) & ascend.all(1), lambda b: "indices are no rows, or do not ascend"),
        *map(equal, KINDS, found, (text, visual)),
        equal("rows in all, padding included,", counts, text + visual),
        asked_stay(asked, rows.drafts),
    )
