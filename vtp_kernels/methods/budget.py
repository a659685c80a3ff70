"""How many visual tokens a `keep` setting stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vtp_kernels._shown import shown

__all__ = ["SHARES", "as_tuple", "check_keep", "check_layer", "check_share", "visual_budget"]

SHARES = "one for each layer, as (0.5, 0.25)"


def as_tuple(values: Any, where: str, what: str = "layers, as (8, 16)") -> tuple[Any, ...]:
    """A tuple of several settings, which come as a list from JSON; TypeError naming `where` if they
    are not several."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{where}: expected {what}, got {shown(values)}")
    return tuple(values)


def check_layer(layer: object, where: str) -> int:
    """`layer` as an int >= 0; TypeError or ValueError naming `where` otherwise."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{where}: a layer is an int, got {shown(layer)}")
    if layer < 0:
        raise ValueError(f"{where}: layers are counted from 0, got {layer}")
    return layer


def check_keep(keep: object, where: str) -> int | float:
    """`keep` as a count (int >= 0) or a share (float, 0 to 1); raises naming `where` otherwise."""
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(
            f"{where}: keep is an int (tokens) or a float (share of the visual tokens), "
            f"got {shown(keep)}"
        )
    if isinstance(keep, int):
        if keep < 0:
            raise ValueError(f"{where}: cannot keep {keep} tokens")
    elif not (math.isfinite(keep) and 0.0 <= keep <= 1.0):
        raise ValueError(f"{where}: a share lies between 0.0 and 1.0, got {keep}")
    return keep


def check_share(share: object, where: str) -> None:
    """Raise TypeError or ValueError, naming `where`, for what is no share of `keep`, 0 to 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{where}: expected a share of keep, got {shown(share)}")
    if not 0 <= share <= 1:
        raise ValueError(f"{where}: a share lies between 0.0 and 1.0, got {share}")


def visual_budget(keep: int | float, visual_tokens: int) -> int:
    """Tokens that stay of a prompt's `visual_tokens` (all its images together).

    An int is a count, cut to what there is. A float is a share of the visual tokens the prompt
    came with, rounded to the nearest count, halves up: 0.5 of 575 keeps 288.
    """
    if isinstance(keep, int):
        return min(keep, visual_tokens)
    return min(math.floor(keep * visual_tokens + 0.5), visual_tokens)
