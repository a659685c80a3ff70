"""The rows whose logits a call asks for: they have to be there in the end, whatever they are."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtp_kernels.ops import _checks

from ..keys.positions import rows_that_left

__all__ = ["Asked", "rows_asked_for", "takes_logits_to_keep"]


class Asked(NamedTuple):
    """Of a call of S rows."""

    rows: Tensor | slice
    """Which rows are asked for, bool [S], or from where on to the last."""
    drafts: int
    """Rows behind the last prompt token: drafts of assisted decoding."""
    all: bool
    """Whether all are, as far as they are left: `rows` names the last one alone."""
    by_index: bool
    """Whether the model takes them by their index among S rows, and not from the end."""

    def leave_out(self, rows: Tensor) -> None:
        """Take those that are asked for out of `rows` bool [B, S]."""
        if self.by_index:
            rows &= ~self.rows
        else:
            rows[:, self.rows].fill_(False)

    def check(self, origin: Tensor, real: Tensor, prompt: Tensor, method: str, layer: int) -> None:
        """Raise ValueError if one that is asked for by index has left. `origin`, `real` and
        `prompt` as of `rows_that_left`. Reads them."""
        gone = rows_that_left(origin, real, self.rows & prompt).nonzero()
        if len(gone):
            prompt, row = gone[0].tolist()
            raise ValueError(
                f"logits_to_keep: it asks for row {row} of every prompt, and {method} lets that of "
                f"prompt {prompt} leave before layer {layer}; ask for the last rows by a number, "
                "or use a method that keeps all text"
            )


@functools.cache
def takes_logits_to_keep(kind: type[nn.Module]) -> bool:
    """Whether a model's forward can be asked for some logits; others give all, whatever is said."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def rows_asked_for(logits_to_keep: Any, rows: int, device: torch.device) -> Asked:
    """`logits_to_keep` is the model's argument: how many of the last rows, 0 for all that are left;
    or a tensor of indices among the `rows` of the call, or bool [S].

    Raises IndexError for indices that are not there.
    """
    if not isinstance(logits_to_keep, Tensor):
        drafts = max(logits_to_keep or 1, 1) - 1
        last = slice(max(rows - 1 - drafts, 0), None)
        return Asked(last, drafts, not logits_to_keep, False)
    asked = torch.arange(rows, device=device) == rows - 1
    index = logits_to_keep.to(device)
    if index.dtype == torch.bool:
        if index.shape != (rows,):
            raise IndexError(f"logits_to_keep: expected bool [{rows}], got {list(index.shape)}")
        return Asked(asked | index.ne(0), 0, False, True)
    index = index.reshape(-1).long()
    if _checks.may_read(index) and bool(((index < -rows) | (index >= rows)).any()):
        raise IndexError(f"logits_to_keep: there are {rows} rows, got {logits_to_keep.tolist()}")
    return Asked(asked.index_fill(0, index % rows, True), 0, False, True)
