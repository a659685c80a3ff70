"""Which visual token shows which part of which picture of a batch: what drawings of it need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..families import parts_of
from ..families.looks import Given, Looks, View
from ..families.placing import placed
from .encoding import outlines_of

__all__ = ["PictureGrid", "View", "picture_grids"]


class PictureGrid(NamedTuple):
    """A picture, or a frame of a video, in a batch of prompts.

    prompt: the prompt it belongs to. columns: int64 [N], the input columns of its visual tokens.
    Those that no view shows (as `image_newline`) show nothing of the picture.

    Of a frame, video: which video of the batch it is of, from 0; and frames: which frames of that
    it shows. There are several where the model merges them, as Qwen does two and two.
    """

    prompt: int
    columns: Tensor
    views: tuple[View, ...]
    video: int | None = None
    frames: range | None = None


def picture_grids(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    images: Sequence[Any] | None = None,
    videos: Sequence[Sequence[Any]] | None = None,
    processor: Any = None,
) -> list[PictureGrid]:
    """The grids of all pictures and frames of a batch, in the order in which they stand in the
    prompts.

    Parameters
    ----------
    model : a transformers model of a supported family
    inputs : what the model is called with
        `input_ids` int64 [B, S] and what the processor made of the pictures and videos.
    images : list of PIL images, optional
        The pictures of all prompts in order. Families that cut pictures into tiles need them.
    videos : list of lists of PIL images, optional
        The frames of all videos in order. Frames of InternVL and SmolVLM are pictures: they belong
        to `images`.
    processor : optional
        What made `inputs`. With `images` it tells what of a picture LLaVA-1.5 is shown: its
        processors cut off what is not square, or pad it.

    Raises
    ------
    NotImplementedError
        If the family, or its vision tower, does not say what its tokens show.
    ValueError
        If the visual tokens of a prompt are not those of whole pictures.
    """
    parts = parts_of(model)
    arguments = dict(inputs)
    if not parts.has_images(arguments):
        return []
    here = {kind: rows.cpu() for kind, rows in parts.placeholders(arguments).items()}
    given = Given(
        parts.base,
        parts.page.tower(parts.base),
        outlines_of(arguments, parts.page.modalities),
        here,
        None if images is None else [(image.height, image.width) for image in images],
        getattr(processor, "image_processor", processor),
        None if videos is None else [(frames[0].height, frames[0].width) for frames in videos],
        getattr(processor, "video_processor", None),
    )
    grids: list[PictureGrid] = []
    if "image" in here:
        looks = parts.page.looks(given)
        _check("images", "pictures", images, len(looks))
        grids += _grids(looks, here["image"], "pictures")
    if "video" in here:
        looks = parts.page.frames(given)
        _check("videos", "videos", videos, 1 + max(look.video for look in looks))
        grids += _grids(looks, here["video"], "frames")
    return sorted(grids, key=lambda grid: (grid.prompt, int(grid.columns[0])))


def _check(name: str, what: str, given: Sequence[Any] | None, count: int) -> None:
    if given is not None and len(given) != count:
        raise ValueError(f"{name}: expected the {count} {what} of inputs, got {len(given)}")


def _grids(looks: list[Looks], rows: Tensor, what: str) -> list[PictureGrid]:
    return [
        PictureGrid(prompt, columns, look.views, look.video, look.frames)
        for index, prompt, columns in placed([look.tokens for look in looks], rows, what)
        for look in [looks[index]]
    ]
