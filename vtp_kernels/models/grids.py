"""Which visual token shows which part of which picture of a batch: what drawings of it need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import ModelParts, parts_of
from .looks import Given, Looks, View
from .towers import tower_of

__all__ = ["PictureGrid", "View", "grids_of", "picture_grids"]


class PictureGrid(NamedTuple):
    """A picture in a batch of prompts.

    prompt: the prompt it belongs to. columns: int64 [N], the input columns of its visual tokens.
    Those that no view shows (as `image_newline`) show nothing of the picture.
    """

    prompt: int
    columns: Tensor
    views: tuple[View, ...]


def picture_grids(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    images: Sequence[Any] | None = None,
    processor: Any = None,
) -> list[PictureGrid]:
    """The grids of all pictures of a batch, in the order in which they stand in the prompts.

    Parameters
    ----------
    model : a transformers model of a supported family
    inputs : what the model is called with
        `input_ids` int64 [B, S] and what the processor made of the pictures.
    images : list of PIL images, optional
        The pictures of all prompts in order. InternVL needs them for pictures in several tiles.
    processor : optional
        What made `inputs`. With `images` it tells what of a picture LLaVA-1.5 is shown: its
        processors cut off what is not square, or pad it.

    Raises
    ------
    NotImplementedError
        If the family, or its vision tower, does not say what its tokens show; for videos.
    ValueError
        If the visual tokens of a prompt are not those of whole pictures.
    """
    sizes = None if images is None else [(image.height, image.width) for image in images]
    image_processor = getattr(processor, "image_processor", processor)
    parts = parts_of(model)
    arguments = dict(inputs)
    if not parts.has_images(arguments):
        return []
    return grids_of(parts, arguments, parts.visual_tokens(arguments), sizes, image_processor)


def grids_of(
    parts: ModelParts,
    arguments: Mapping[str, Any],
    placeholders: Tensor,
    sizes: list[tuple[int, int]] | None = None,
    image_processor: Any = None,
) -> list[PictureGrid]:
    """As `picture_grids`, from the arguments of `get_image_features` and bool [B, S]: which input
    columns get image features."""
    if any(m.name == "video" and m.comes_with(dict(arguments)) for m in parts.page.modalities):
        raise NotImplementedError("pixel_values_videos: frames of videos are not drawn")
    placeholders = placeholders.cpu()
    tower = tower_of(parts.family, parts.base)
    runs = [run for row in placeholders for run in _runs(row)]
    given = Given(parts.base, tower, arguments, runs, sizes, image_processor)
    looks = parts.page.looks(given)
    if sizes is not None and len(sizes) != len(looks):
        raise ValueError(f"images: expected the {len(looks)} pictures of inputs, got {len(sizes)}")
    return _placed(looks, placeholders)


def _runs(row: Tensor) -> list[int]:
    lengths = torch.unique_consecutive(row, return_counts=True)
    return [length for visual, length in zip(*(x.tolist() for x in lengths), strict=True) if visual]


def _placed(looks: list[Looks], placeholders: Tensor) -> list[PictureGrid]:
    """Pictures fill the placeholders of the prompts in turn."""
    grids, left = [], list(looks)
    for prompt, row in enumerate(placeholders):
        columns = row.nonzero()[:, 0]
        while len(columns):
            if not left or left[0].tokens > len(columns):
                raise ValueError(
                    f"input_ids: the {int(row.sum())} visual tokens of prompt {prompt} are not "
                    f"those of whole pictures; the pictures have "
                    f"{[look.tokens for look in looks]} tokens"
                )
            look = left.pop(0)
            grids.append(PictureGrid(prompt, columns[: look.tokens], look.views))
            columns = columns[look.tokens :]
    if left:
        raise ValueError(f"input_ids: no visual tokens for {len(left)} of {len(looks)} pictures")
    return grids
