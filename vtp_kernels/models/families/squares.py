"""What the tokens of pictures show that are made squares, each by itself, or cut into squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..looks import WHOLE, Box, Given, Looks, View, cells, centered

__all__ = [
    "arrangement",
    "cropped_squares",
    "padded",
    "shown_by",
    "shown_frames",
    "side_of",
    "squares",
    "tiles_then_whole",
]


def squares(given: Given, box: Callable[[int, int], Box] | None = None) -> list[Looks]:
    """As many tokens for every picture, in reading order. `box`: where the square lies, of a
    picture of that height and width; None: over the whole of it."""
    pictures, side = given.told("image").parts, side_of(given)
    looks = []
    for index in range(pictures):
        place = WHOLE
        if box is not None and given.sizes is not None and index < len(given.sizes):
            place = box(*given.sizes[index])
        looks.append(Looks(side * side, (View("whole", cells(side, side), place),)))
    return looks


def cropped_squares(given: Given) -> list[Looks]:
    """The same where processors cut off what is not square."""
    processor = given.processor
    if processor is None:
        return squares(given)
    return squares(given, lambda height, width: shown_by(processor, height, width))


def shown_frames(given: Given, size: tuple[int, int] | None) -> Box:
    """What of frames of that height and width is shown: all, as far as is known."""
    processor = given.video_processor
    return WHOLE if processor is None or size is None else shown_by(processor, *size)


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


def padded(height: int, width: int) -> Box:
    """A picture in the middle of a square."""
    edge = max(height, width)
    return centered(edge / height, edge / width)


def shown_by(processor: Any, height: int, width: int) -> Box:
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
    return centered(tall / height, wide / width)


def tiles_then_whole(order: Tensor, tiles: int, rows: int, columns: int) -> Looks:
    """Tiles that fill the picture, then the whole picture; or this alone. order: int64 [H, W],
    which of a tile's tokens shows which of its cells."""
    per_tile, (high, wide) = order.numel(), order.shape
    whole = View("whole", order + tiles * per_tile)
    if not tiles:
        return Looks(per_tile, (whole,))
    first = cells(rows, columns) * per_tile
    tokens = first[:, None, :, None] + order[None, :, None, :]
    crops = View("crops", tokens.reshape(rows * high, columns * wide))
    return Looks((tiles + 1) * per_tile, (whole, crops))


def arrangement(given: Given, index: int, tiles: int, edge: int) -> tuple[int, int]:
    """Rows and columns of a picture's tiles in InternVL and GOT: those that come nearest to its own
    shape."""
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as module

    if not tiles:
        return 0, 0
    if given.sizes is None or index >= len(given.sizes):
        raise NotImplementedError(
            f"images: how {given.base.config.model_type} lays out tiles depends on a picture's "
            "shape, which its inputs do not tell; pass the pictures"
        )
    columns, rows = module.get_optimal_tiled_canvas(given.sizes[index], (edge, edge), tiles, tiles)
    if rows * columns != tiles:
        raise NotImplementedError(
            f"pixel_values: {tiles} tiles and a whole picture are not as its processor cuts "
            "pictures"
        )
    return rows, columns
