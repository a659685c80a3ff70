"""Which visual token shows which part of which picture, by family: what drawings of it need.

A model looks at a picture once or twice: at the whole of it, and in families that cut pictures into
crops at these put together. Each look is a View: cells in rows and columns, and where they lie.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import MODALITIES, ModelParts, parts_of
from .towers import Tower, tower_of

__all__ = ["PictureGrid", "View", "grids_of", "picture_grids"]

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


class PictureGrid(NamedTuple):
    """A picture in a batch of prompts.

    prompt: the prompt it belongs to. columns: int64 [N], the input columns of its visual tokens.
    Those that no view shows (as `image_newline`) show nothing of the picture.
    """

    prompt: int
    columns: Tensor
    views: tuple[View, ...]


class Given(NamedTuple):
    """What there is to tell the grids from."""

    base: nn.Module
    tower: Tower | None
    arguments: Mapping[str, Any]
    runs: list[int]
    """Visual tokens that follow upon each other, over all prompts."""
    sizes: list[tuple[int, int]] | None
    """Height and width of every picture, where they are known."""
    processor: Any
    """The image processor, where it is known."""


class Looks(NamedTuple):
    """A picture's visual tokens, how many they are, and what they show."""

    tokens: int
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
    if any(m.name == "video" and m.comes_with(dict(arguments)) for m in MODALITIES):
        raise NotImplementedError("pixel_values_videos: frames of videos are not drawn")
    placeholders = placeholders.cpu()
    tower = tower_of(parts.family, parts.base)
    runs = [run for row in placeholders for run in _runs(row)]
    given = Given(parts.base, tower, arguments, runs, sizes, image_processor)
    looks = GRIDS[parts.family](given)
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


# ---- one a family -------------------------------------------------------------------------------


def _tower(given: Given) -> Tower:
    if given.tower is None:
        kind = given.base.config.vision_config.model_type
        raise NotImplementedError(f"what the tokens of a {kind!r} vision tower show is not known")
    return given.tower


def _side(given: Given) -> int:
    """Rows, and columns, of patches that the vision tower sees at once."""
    vision = given.base.config.vision_config
    size, patch = (_first(x) for x in (vision.image_size, vision.patch_size))
    return size // patch


def _first(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _cells(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns).view(rows, columns)


def _squares(given: Given) -> list[Looks]:
    """LLaVA-1.5: every picture as one square, perhaps with CLS before it."""
    side, pixels = _side(given), given.arguments.get("pixel_values")
    shows = _tower(given)._shows(given.arguments, 1, side * side)
    (tokens,) = (shows >= 0).nonzero(as_tuple=True)
    pictures = sum(given.runs) // len(shows) if pixels is None else len(pixels)
    looks = []
    for index in range(pictures):
        box = WHOLE
        if given.sizes is not None and given.processor is not None and index < len(given.sizes):
            box = _seen(given.processor, *given.sizes[index])
        looks.append(Looks(len(shows), (View("whole", tokens.view(side, side), box),)))
    return looks


def _seen(processor: Any, height: int, width: int) -> Box:
    """What of a picture of that size is shown: processors pad it, resize it and cut its edges."""
    tall, wide = height, width
    if getattr(processor, "do_pad", None):
        tall = wide = max(height, width)
    scales = 1.0, 1.0
    if processor.do_resize:
        size = processor.size
        if getattr(size, "shortest_edge", None):
            scales = (size.shortest_edge / min(tall, wide),) * 2
        else:
            scales = size.height / tall, size.width / wide
    if processor.do_center_crop:
        crop = processor.crop_size
        tall, wide = crop.height / scales[0], crop.width / scales[1]
    return _centered(tall / height, wide / width)


def _centered(tall: float, wide: float) -> Box:
    """Cells so many times as high and wide as the picture, with its middle in theirs."""
    return (1 - wide) / 2, (1 - tall) / 2, (1 + wide) / 2, (1 + tall) / 2


def _crops(given: Given, cut: list[bool] | None = None) -> list[Looks]:
    """LLaVA-NeXT: the whole picture, then its crops put together, with an `image_newline` behind
    each row. With one crop there is the whole picture alone, and one `image_newline`."""
    base, tower, side = given.base, _tower(given), _side(given)
    model, pinpoints = sys.modules[type(base).__module__], base.config.image_grid_pinpoints
    edge = base.config.vision_config.image_size
    sizes = torch.as_tensor(given.arguments["image_sizes"]).tolist()
    counts = [
        model.image_size_to_num_patches(size, pinpoints, edge) if is_cut else 1
        for size, is_cut in zip(sizes, cut or [True] * len(sizes), strict=True)
    ]
    shows = tower._shows(given.arguments, sum(counts), side * side)
    picture = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts) * side * side)[shows]
    # A newline belongs to the picture of the token before it.
    latest = torch.where(shows < 0, 0, torch.arange(len(shows))).cummax(0).values
    looks = []
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        rows = shows[picture[latest] == index]
        whole = View("whole", _cells(side, side), WHOLE if count > 1 else _padded(size))
        views = (whole,)
        if count > 1:
            grid = model.get_anyres_image_grid_shape(size, pinpoints, edge)
            views = (whole, _put_together(model, rows[side * side :], size, grid, side))
        looks.append(Looks(len(rows), views))
    return looks


def _padded(size: list[int]) -> Box:
    """A picture that is not cut is padded to a square."""
    return _centered(max(size) / size[0], max(size) / size[1])


def _put_together(
    model: Any, rows: Tensor, size: list[int], grid: tuple[int, int], side: int
) -> View:
    """The view of crops, from what shows them: lines of tokens that each end in a newline."""
    width = int((rows < 0).nonzero()[0])
    lines = rows.view(-1, width + 1)
    if not ((lines[:, :width] >= 0).all() and (lines[:, width] < 0).all()):
        raise NotImplementedError("image_newline: expected one behind each row of the crops")
    height = len(lines)
    tokens = side * side + _cells(height, width + 1)[:, :width]
    # The places of all cells through the model's own unpadding: its first and its last are left.
    tall, wide = grid[0] * side, grid[1] * side
    y, x = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    inside = model.unpad_image(torch.stack((y, x)), size)
    (top, left), (bottom, right) = inside[:, 0, 0].tolist(), (inside[:, -1, -1] + 1).tolist()
    # The picture lies in the middle of the crops, as large as they have room for.
    scale = min(tall / size[0], wide / size[1])
    high, broad = size[0] * scale, size[1] * scale
    y, x = (tall - high) / 2, (wide - broad) / 2
    box = (left - x) / broad, (top - y) / high, (right - x) / broad, (bottom - y) / high
    return View("crops", tokens, box)


def _crops_of_lone_pictures(given: Given) -> list[Looks]:
    """LLaVA-OneVision: as LLaVA-NeXT, but pictures are cut only where a prompt has just one."""
    counts = given.arguments.get("batch_num_images")
    if counts is None:
        return _crops(given)
    return _crops(given, [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)])


def _tiles(given: Given) -> list[Looks]:
    """InternVL: tiles that fill the picture, then the whole picture; or this alone."""
    patches = _tower(given)._patches(_side(given) ** 2)
    per_tile, side = len(patches), round(len(patches) ** 0.5)
    # Where a token's patches are, as the model's own shuffling puts them.
    y, x = (patches // _side(given)).min(1).values, (patches % _side(given)).min(1).values
    step = _side(given) // side
    order = torch.empty(side, side, dtype=torch.long)
    order[y // step, x // step] = torch.arange(per_tile)
    looks = []
    for index, run in enumerate(given.runs):
        count, rest = divmod(run, per_tile)
        if rest:
            raise ValueError(
                f"input_ids: {run} visual tokens follow upon each other, and tiles of pictures "
                f"have {per_tile}"
            )
        whole = View("whole", order + (count - 1) * per_tile)
        views = (whole,)
        if count > 1:
            rows, columns = _arrangement(given, index, count - 1)
            tiles = torch.arange(rows * columns).view(rows, columns) * per_tile
            cells = tiles[:, None, :, None] + order[None, :, None, :]
            views = (whole, View("crops", cells.reshape(rows * side, columns * side)))
        looks.append(Looks(run, views))
    return looks


def _arrangement(given: Given, index: int, tiles: int) -> tuple[int, int]:
    """Rows and columns of a picture's tiles: those that come nearest to its own shape."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as module

    if given.sizes is None or index >= len(given.sizes):
        raise NotImplementedError(
            "images: how InternVL lays out tiles depends on a picture's shape, which its inputs do "
            "not tell; pass the pictures"
        )
    edge = _first(given.base.config.vision_config.image_size)
    columns, rows = module.get_optimal_tiled_canvas(given.sizes[index], (edge, edge), tiles, tiles)
    if rows * columns != tiles:
        raise NotImplementedError(
            f"pixel_values: {tiles} tiles and a whole picture are not as InternVL's processor "
            "cuts pictures"
        )
    return rows, columns


def _merged(given: Given) -> list[Looks]:
    """Qwen: pictures keep their shape; a token shows a square of patches."""
    merge = given.base.config.vision_config.spatial_merge_size
    looks = []
    for time, height, width in torch.as_tensor(given.arguments["image_grid_thw"]).tolist():
        if time != 1:
            raise NotImplementedError(f"image_grid_thw: {time} frames in one picture are not drawn")
        rows, columns = height // merge, width // merge
        looks.append(Looks(rows * columns, (View("whole", _cells(rows, columns)),)))
    return looks


GRIDS = {
    "llava": _squares,
    "llava_next": _crops,
    "llava_onevision": _crops_of_lone_pictures,
    "internvl": _tiles,
    "qwen2_5_vl": _merged,
    "qwen3_vl": _merged,
}
