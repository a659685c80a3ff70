"""LLaVA-NeXT (1.6): the whole picture and its crops, with an `image_newline` behind each row."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..towers import CroppedTower
from .family import Family
from .looks import WHOLE, Given, Looks, View, cells
from .squares import padded
from .tiny import IMAGE, TEXT, Tiny, anyres, clip

__all__ = ["LlavaNext", "crops_together"]


class LlavaNext(Family):
    name = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)
    example = "llava-hf/llava-v1.6-mistral-7b-hf"
    text_models = ("llama", "mistral", "qwen2")
    towers = (CroppedTower,)

    def looks(self, given: Given) -> list[Looks]:
        return crops_together(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

        def make() -> Any:
            return LlavaNextForConditionalGeneration(
                LlavaNextConfig(
                    vision_config=clip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
                    image_seq_length=16,
                )
            )

        return {"llava_next": Tiny(make, anyres)}


def crops_together(
    given: Given, cut: list[bool] | None = None, side: int | None = None
) -> list[Looks]:
    """The whole picture, then its crops put together. With one crop there is the whole picture
    alone, and one `image_newline`. `cut`: which pictures are cut into crops; None: all. `side`:
    tokens in a row of a crop; None: one a patch."""
    base, tower, side = given.base, given.tower, side or given.side
    model, pinpoints = sys.modules[type(base).__module__], base.config.image_grid_pinpoints
    edge = base.config.vision_config.image_size
    sizes = given.grid("image_sizes")
    counts = [
        model.image_size_to_num_patches(size, pinpoints, edge) if is_cut else 1
        for size, is_cut in zip(sizes, cut or [True] * len(sizes), strict=True)
    ]
    shows = tower.shows(given.arguments, sum(counts), side * side)
    picture = torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts) * side * side)[shows]
    # A newline belongs to the picture of the token before it.
    latest = torch.where(shows < 0, 0, torch.arange(len(shows))).cummax(0).values
    looks = []
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        rows = shows[picture[latest] == index]
        whole = View("whole", cells(side, side), WHOLE if count > 1 else padded(size))
        views = (whole,)
        if count > 1:
            grid = model.get_anyres_image_grid_shape(size, pinpoints, edge)
            views = (whole, _put_together(model, rows[side * side :], size, grid, side))
        looks.append(Looks(len(rows), views))
    return looks


def _put_together(
    model: Any, rows: Tensor, size: list[int], grid: tuple[int, int], side: int
) -> View:
    """The view of crops, from what shows them: lines of tokens that each end in a newline."""
    width = int((rows < 0).nonzero()[0])
    lines = rows.view(-1, width + 1)
    if not ((lines[:, :width] >= 0).all() and (lines[:, width] < 0).all()):
        raise NotImplementedError("image_newline: expected one behind each row of the crops")
    tokens = side * side + cells(len(lines), width + 1)[:, :width]
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
