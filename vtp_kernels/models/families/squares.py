"""What the tokens of pictures show that are made squares, each by itself, or cut into squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .looks import WHOLE, Box, Given, Looks, Size, View, cells, centered, whole

__all__ = [
    "arrangement",
    "cropped_squares",
    "cut_of",
    "folded",
    "padded",
    "pictures_of",
    "shown_by",
    "side_of",
    "squares",
    "tiled",
    "tiles_of",
    "tiles_then_whole",
]


def squares(given: Given, box: Callable[[Size], Box] = lambda size: WHOLE) -> list[Looks]:
    """As many tokens for every picture, in reading order. `box`: where the square lies."""
    pictures, side = given.told("image").parts, side_of(given)
    return [whole(side, side, box(given.size_of(index))) for index in range(pictures)]


def cropped_squares(given: Given) -> list[Looks]:
    """The same where processors cut off what is not square."""
    return squares(given, partial(shown_by, given.processor))


def side_of(given: Given) -> int:
    """Tokens in a row of the squares."""
    outline = given.told("image")
    total = sum(given.runs) if outline.features is None else sum(outline.features)
    tokens, rest = divmod(total, outline.parts)
    side = round(tokens**0.5)
    if rest or side * side != tokens:
        raise ValueError(
            f"input_ids: {total} visual tokens are not {outline.parts} squares of equal size"
        )
    return side


def padded(size: Size) -> Box:
    """A picture in the middle of a square."""
    if size is None:
        return WHOLE
    height, width = size
    edge = max(height, width)
    return centered(edge / height, edge / width)


def shown_by(processor: Any, size: Size) -> Box:
    """What of a picture, or of frames, is shown: processors pad it, resize it and cut its edges.
    All, as far as is known."""
    if processor is None or size is None:
        return WHOLE
    tall, wide = height, width = size
    if getattr(processor, "do_pad", None):
        tall = wide = max(height, width)
    scales = 1.0, 1.0
    if processor.do_resize:
        edges = processor.size
        if getattr(edges, "shortest_edge", None):
            scales = (edges.shortest_edge / min(tall, wide),) * 2
        else:
            scales = edges.height / tall, edges.width / wide
    if processor.do_center_crop:
        crop = processor.crop_size
        tall, wide = crop.height / scales[0], crop.width / scales[1]
    return centered(tall / height, wide / width)


def folded(given: Given) -> Tensor:
    """int64 [H, W]: which of a square's tokens shows which of its cells, where a tower lays squares
    of patches side by side."""
    patches = given.tower.patches_of_tokens(given.arguments, given.side**2)
    side = round(len(patches) ** 0.5)
    # Where a token's patches are, as the model's own shuffling puts them.
    y, x = (patches // given.side).min(1).values, (patches % given.side).min(1).values
    step = given.side // side
    order = torch.empty(side, side, dtype=torch.long)
    order[y // step, x // step] = torch.arange(len(patches))
    return order


def tiles_then_whole(order: Tensor, tiles: int, rows: int, columns: int) -> Looks:
    """Tiles that fill the picture, then the whole picture; or this alone. order: int64 [H, W],
    which of a tile's tokens shows which of its cells."""
    per_tile = order.numel()
    at_once = View("whole", order + tiles * per_tile)
    if not tiles:
        return Looks(per_tile, (at_once,))
    return Looks((tiles + 1) * per_tile, (at_once, View("crops", tiled(order, rows, columns))))


def tiled(order: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows * H, columns * W]: the tokens of tiles that lie as they follow upon each other,
    each of them as `order` [H, W]."""
    high, wide = order.shape
    first = cells(rows, columns) * order.numel()
    tokens = first[:, None, :, None] + order[None, :, None, :]
    return tokens.reshape(rows * high, columns * wide)


def tiles_of(
    given: Given, tokens: int, grid: Callable[[Any, tuple[int, int]], tuple[int, int]]
) -> list[tuple[int, int]]:
    """Rows and columns of tiles of each picture; 0 of one that is not cut. For families whose tiles
    have words between them: how many a prompt has is told, and not which picture they are of.

    tokens: of a tile. grid: asks the processor how it cuts a picture of a height and a width.
    """
    tiles = [int(row.sum()) // tokens for row in given.placeholders["image"]]
    # A picture that is cut has two tiles at least, and comes once more as a whole.
    if max(tiles) < 3 or (given.sizes is not None and len(given.sizes) == sum(tiles)):
        return [(0, 0)] * sum(tiles)
    found = []
    for size in pictures_of(given):
        rows, columns = grid(given.processor, size)
        found.append((rows, columns) if rows * columns > 1 else (0, 0))
    return found


def cut_of(processor: Any, size: tuple[int, int]) -> Any:
    """What a processor makes, and says, of a picture of a height and a width."""
    from PIL import Image

    height, width = size
    blank = [[Image.new("RGB", (width, height))]]
    return processor(blank, return_row_col_info=True, return_tensors="pt")


def pictures_of(given: Given) -> list[tuple[int, int]]:
    """Height and width of each picture, where the processor is known too.

    Raises NotImplementedError where they are not."""
    if given.sizes is None or given.processor is None:
        raise NotImplementedError(
            f"images, processor: how {given.base.config.model_type} cuts a picture into tiles "
            "depends on its shape, which its inputs do not tell; pass the pictures and the "
            "processor"
        )
    return given.sizes


def arrangement(given: Given, index: int, tiles: int, edge: int) -> tuple[int, int]:
    """Rows and columns of a picture's tiles in InternVL and GOT: those that come nearest to its own
    shape."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as module

    if not tiles:
        return 0, 0
    size = given.size_of(index)
    if size is None:
        raise NotImplementedError(
            f"images: how {given.base.config.model_type} lays out tiles depends on a picture's "
            "shape, which its inputs do not tell; pass the pictures"
        )
    columns, rows = module.get_optimal_tiled_canvas(size, (edge, edge), tiles, tiles)
    if rows * columns != tiles:
        raise NotImplementedError(
            f"pixel_values: {tiles} tiles and a whole picture are not as its processor cuts "
            "pictures"
        )
    return rows, columns
