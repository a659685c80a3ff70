"""What a model's visual tokens show of a picture: its looks at it, as a family tells them.

A model looks at a picture once or twice: at the whole of it, and in families that cut pictures into
crops at these put together. Each look is a View: cells in rows and columns, and where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .towers import Tower

__all__ = ["WHOLE", "Box", "Given", "Looks", "View", "cells", "centered", "one_size"]

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class View(NamedTuple):
    """One look at a picture.

    name: "whole" or "crops". tokens: int64 [H, W], which of the picture's visual tokens shows each
    cell, counted from 0. box: left, top, right and bottom of all cells together, as shares of the
    picture's width and height: beyond 0 and 1 is padding, within them is what was cut off.
    """

    name: str
    tokens: Tensor
    box: Box = WHOLE


class Looks(NamedTuple):
    """A picture's visual tokens, how many they are, and what they show."""

    tokens: int
    views: tuple[View, ...]


class Given(NamedTuple):
    """What there is to tell the looks from."""

    base: nn.Module
    known_tower: Tower | None
    arguments: Mapping[str, Any]
    runs: list[int]
    """Visual tokens that follow upon each other, over all prompts."""
    sizes: list[tuple[int, int]] | None
    """Height and width of every picture, where they are known."""
    processor: Any
    """The image processor, where it is known."""

    @property
    def tower(self) -> Tower:
        if self.known_tower is None:
            kind = self.base.config.vision_config.model_type
            raise NotImplementedError(
                f"what the tokens of a {kind!r} vision tower show is not known"
            )
        return self.known_tower

    @property
    def side(self) -> int:
        """Rows, and columns, of patches that the vision tower sees at once."""
        vision = self.base.config.vision_config
        return one_size(vision.image_size) // one_size(vision.patch_size)


def one_size(size: Any) -> int:
    """Of a square: configs say its side once or twice."""
    return size if isinstance(size, int) else size[0]


def cells(rows: int, columns: int) -> Tensor:
    """int64 [rows, columns]: tokens in reading order."""
    return torch.arange(rows * columns).view(rows, columns)


def centered(tall: float, wide: float) -> Box:
    """Cells so many times as high and wide as the picture, with its middle in theirs."""
    return (1 - wide) / 2, (1 - tall) / 2, (1 + wide) / 2, (1 + tall) / 2
