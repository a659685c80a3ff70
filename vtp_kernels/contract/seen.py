"""What a decision is shown of the layer before it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Observed", "Sight"]


class Observed(Protocol):
    """An attention that has run: its queries, keys and values can be had again."""

    @property
    def scale(self) -> float: ...

    def heads(self, query: Tensor) -> Any:
        """Where the heads are of which `query` [B, H, ...] has some: other ranks may have more."""

    def queries(self, rows: slice, rotary: bool = True) -> Tensor:
        """[B, Hq, M, D] of the given rows, with their rotary position embedding or without."""

    def keys(self, past: int) -> Tensor:
        """[B, Hkv, past + S, D] of all rows, as the attention got them."""

    def unrotated_keys(self) -> Tensor:
        """[B, Hkv, S, D] of all rows, without the rotary position embedding."""

    def values(self, past: int) -> Tensor:
        """[B, Hkv, past + S, D] of all rows, as the attention got them."""


class Sight(NamedTuple):
    """What rows saw in the layer that was observed, where that was anything else than all keys
    before them."""

    columns: Tensor
    """int64 [B, past + S]: of the keys that were there; -1 for padding."""
    first: Tensor | None
    """int64 [B, S]: the first column that each of the S rows saw; None: all of them the first."""
    ends: Tensor
    """int64 [B, S]: the last column that each of them saw."""

    def keys(self, row: int) -> Tensor | None:
        """bool [B, past + S]: the keys not too far back for a row to see; None: all."""
        return None if self.first is None else self.columns >= self.first[:, row, None]

    def last(self, rows: slice) -> Tensor:
        """int64 [B, M]: of the keys that each of some rows saw, the last."""
        past = self.columns.shape[1] - self.ends.shape[1]
        own = self.columns[:, past:].contiguous()  # no earlier key comes last
        ends = self.ends[:, rows].contiguous()
        return torch.searchsorted(own, ends, right=True) - 1 + past
