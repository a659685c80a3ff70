"""What a model's visual tokens show of a picture: its looks at it, as a family tells them.

A model looks at a picture once or twice: at the whole of it, and in families that cut pictures into
crops at these put together. Each look is a View: cells in rows and columns, and where they lie. A
frame of a video is a picture of its own; frames that a model merges into one grid are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..towers import Tower

__all__ = [
    "WHOLE",
    "Box",
    "Given",
    "Looks",
    "Outline",
    "Size",
    "View",
    "cells",
    "centered",
    "one_size",
    "outlined",
    "whole",
]

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
Size = tuple[int, int] | None
"""Height and width of a picture, or of the frames of a video, where they are known."""


class View(NamedTuple):
    """One look at a picture.

    name: "whole" or "crops"; "crop 1" and so on where crops have cells of several sizes. tokens:
    int64 [H, W], which of the picture's visual tokens shows each cell, counted from 0. box: left,
    top, right and bottom of all cells together, as shares of the picture's width and height: beyond
    0 and 1 is padding, within them is what was cut off.
    """

    name: str
    tokens: Tensor
    box: Box = WHOLE


class Looks(NamedTuple):
    """A picture's visual tokens, how many they are, and what they show. Of a frame: of which video
    of the batch, and which frames of that it shows."""

    tokens: int
    views: tuple[View, ...]
    video: int | None = None
    frames: range | None = None


class Outline(NamedTuple):
    """What is known of pictures or videos without looking at them.

    shape: of their pixels, where a call brings these. features: the number of features that they
    were encoded to, in as many parts as the model has them in, where it brings those.
    """

    shape: tuple[int, ...] | None
    features: list[int] | None

    @property
    def parts(self) -> int:
        return self.shape[0] if self.features is None else len(self.features)


#: The arguments of a call, besides pixels, that tell how its pictures are laid out. Some families
#: tell it by words around them.
LAYOUT = (
    "image_grid_thw",
    "video_grid_thw",
    "image_merge_sizes",
    "video_merge_sizes",
    "video_compression_mask",
    "image_sizes",
    "batch_num_images",
    "input_ids",
    "spatial_shapes",
    "target_sizes",
    "target_sizes_videos",
    "tile_fine_mask",
    "downsample_mode",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
)


def outlined(arguments: Mapping[str, Any], modalities: Iterable[Any]) -> dict[str, Any]:
    """Those arguments of a call that tell how its pictures are laid out, and in place of pixels or
    features, which are large, the Outline of each of the family's `modalities`."""
    found = {name: arguments[name] for name in LAYOUT if arguments.get(name) is not None}
    for modality in modalities:
        pixels, encoded = modality.given(arguments)
        features = getattr(encoded, "pooler_output", None)
        if pixels is not None or features is not None:
            shape = None if pixels is None else tuple(getattr(pixels, "shape", (len(pixels),)))
            rows = None if features is None else [len(part) for part in features]
            found[modality.name] = Outline(shape, rows)
    return found


@dataclass(frozen=True)
class Given:
    """What there is to tell the looks from."""

    base: nn.Module
    known_tower: Tower | None
    arguments: Mapping[str, Any]
    """As `outlined` gives them."""
    placeholders: Mapping[str, Tensor]
    """bool [B, S] on the CPU, for "image" and "video": the columns that get their features."""
    sizes: list[tuple[int, int]] | None = None
    """Height and width of every picture, where they are known."""
    processor: Any = None
    """The image processor, where it is known."""
    frame_sizes: list[tuple[int, int]] | None = None
    """Height and width of the frames of every video, where they are known."""
    video_processor: Any = None
    """The video processor, where it is known."""

    @cached_property
    def runs(self) -> list[int]:
        """Visual tokens of pictures that follow upon each other, over all prompts."""
        return [run for row in self.placeholders["image"] for run in _runs(row)]

    def told(self, name: str) -> Any:
        """What the call says of its pictures by an argument of that name, or by "image" or "video".

        Raises NotImplementedError where it does not."""
        if self.arguments.get(name) is None:
            raise NotImplementedError(
                f"{name}: a call that does not bring it does not tell how its pictures are laid "
                "out; features that were made before a method was applied come without it"
            )
        return self.arguments[name]

    def size_of(self, picture: int) -> Size:
        return _nth(self.sizes, picture)

    def frame_size_of(self, video: int) -> Size:
        return _nth(self.frame_sizes, video)

    def grid(self, name: str) -> list[list[int]]:
        """The rows of an argument with some numbers for every picture."""
        return torch.as_tensor(self.told(name)).tolist()

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


def _nth(sizes: list[tuple[int, int]] | None, index: int) -> Size:
    return None if sizes is None or index >= len(sizes) else sizes[index]


def _runs(row: Tensor) -> list[int]:
    lengths = torch.unique_consecutive(row, return_counts=True)
    return [length for visual, length in zip(*(x.tolist() for x in lengths), strict=True) if visual]


def one_size(size: Any) -> int:
    """Of a square: configs say its side once or twice."""
    return size if isinstance(size, int) else size[0]


def cells(rows: int, columns: int) -> Tensor:
    """int64 [rows, columns]: tokens in reading order."""
    return torch.arange(rows * columns).view(rows, columns)


def whole(rows: int, columns: int, box: Box = WHOLE) -> Looks:
    """A picture with a token for each of its cells, in reading order."""
    return Looks(rows * columns, (View("whole", cells(rows, columns), box),))


def centered(tall: float, wide: float) -> Box:
    """Cells so many times as high and wide as the picture, with its middle in theirs."""
    return (1 - wide) / 2, (1 - tall) / 2, (1 + wide) / 2, (1 + tall) / 2
