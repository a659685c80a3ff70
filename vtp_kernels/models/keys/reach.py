"""Which rows a row sees: those before it, within a window, and those of its own block.

Rows are known by their column, where they stood in all that the model was given. What a row sees is
always a run of columns, so it sees the same rows whether others have left from between or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..modules.linear import KINDS as LINEAR

__all__ = [
    "PASSIVE",
    "Blocks",
    "LayerKind",
    "Reach",
    "layer_kinds",
    "reach_of",
    "refuse_window",
    "window_of",
]

PASSIVE = "where visual tokens are passive rows see all others"  # so no windows there
MAKES_WINDOWS = "create_sliding_window_causal_mask"  # what a module needs for such masks
KNOWN_LAYERS = ("full_attention", "sliding_attention", *LINEAR)


class LayerKind(NamedTuple):
    """What tells the attention of a model's layers apart."""

    window: int | None = None
    """Columns that a row sees, its own and those before; None: all before."""
    rotary: str | None = None
    """The name by which the model's rotary embedding knows the layer; None where it has but one."""


def layer_kinds(text: nn.Module) -> tuple[LayerKind, ...]:
    """The kind of each layer of a text model.

    Raises NotImplementedError for layers that do not see what is before them or a window of it.
    """
    config = text.config
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(KNOWN_LAYERS))
    if other:
        raise NotImplementedError(
            f"a {config.model_type!r} text model is not supported: it has layers of "
            f"{', '.join(other)}, and only {' and '.join(KNOWN_LAYERS)} are known"
        )
    depth = len(getattr(text, "layers", ()))
    windows = [window_of(config, layer) for layer in range(depth)]
    if any(windows) and not hasattr(sys.modules[type(text).__module__], MAKES_WINDOWS):
        raise NotImplementedError(
            f"a {config.model_type!r} text model is not supported: its config has "
            f"sliding_window={config.sliding_window}, for which it makes no masks; set it to None"
        )
    named = hasattr(getattr(text, "rotary_emb", None), "layer_types")
    return tuple(
        LayerKind(window, config.layer_types[layer] if named else None)
        for layer, window in enumerate(windows)
    )


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, None where it has none. Asked as transformers asks for its
    masks: where layers have no types, all are alike."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window if types is None or types[layer] == "sliding_attention" else None


def refuse_window(attention: nn.Module, what: str) -> None:
    """Raise NotImplementedError for an attention module with a sliding window. `what` says why that
    cannot be."""
    window = window_of(attention.config, attention.layer_idx)
    if window is not None:
        config = attention.config
        types = getattr(config, "layer_types", None) or ()
        full = [str(index) for index, kind in enumerate(types) if kind == "full_attention"]
        others = f"those that see all rows are {', '.join(full)}" if full else "they all do"
        raise NotImplementedError(
            f"layer {attention.layer_idx} sees a sliding window of {window} rows, and {what}; "
            f"leave such layers alone ({others})"
        )


class Blocks:
    """Runs of rows that see each other, those after them included, besides all before them.

    Parameters
    ----------
    ids : int64 [B, C]
        The block of each column, counted from 0, -1 where there is none. Columns beyond C are in
        none.
    in_window : bool
        Whether a sliding window also ends what a row sees of its block.
    """

    def __init__(self, ids: Tensor, in_window: bool) -> None:
        self.in_window = in_window
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        inside = ids >= 0
        starts = pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        ends = pad(starts[:, 1:], (0, 1), value=True)
        first = torch.where(starts, columns, 0).cummax(1).values
        last = torch.where(ends, columns, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        self.first = torch.where(inside, first, columns)
        self.last = torch.where(inside, last, columns)
        self.apart = (starts & inside).sum(1) - (ids.amax(1) + 1)
        """int64 [B]: 0 where each block is one run, as it must be."""

    def first_of(self, columns: Tensor) -> Tensor:
        return self._of(self.first, columns)

    def last_of(self, columns: Tensor) -> Tensor:
        return self._of(self.last, columns)

    @staticmethod
    def _of(ends: Tensor, columns: Tensor) -> Tensor:
        known = (columns >= 0) & (columns < ends.shape[1])
        return torch.where(known, ends.gather(1, columns.clamp(0, ends.shape[1] - 1)), columns)


class Reach(NamedTuple):
    """What rows see: int64 [B, Q] each, the first column (None: the very first) and the last."""

    first: Tensor | None
    last: Tensor

    def over(self, columns: Tensor) -> Callable[..., Tensor]:
        """As a mask function of transformers', over keys of `columns` int64 [B, N]."""
        first, last = self

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            column = columns[batch, key]
            seen = column <= last[batch, query]
            return seen if first is None else seen & (column >= first[batch, query])

        return sees


def reach_of(kind: LayerKind, columns: Tensor, end: int, blocks: Blocks | None) -> Reach | None:
    """What rows at `columns` int64 [B, Q] see in layers of a kind; None where that is just all
    before them. `end` is the column after the last that was given so far."""
    window = kind.window
    # As transformers does it: of exactly as many columns as the window has, it makes a mask.
    if window is not None and end < window:
        window = None
    if blocks is None and window is None:
        return None
    first = None if window is None else columns - (window - 1)
    if blocks is None:
        return Reach(first, columns)
    if first is not None and not blocks.in_window:
        first = torch.minimum(first, blocks.first_of(columns))
    return Reach(first, blocks.last_of(columns))
