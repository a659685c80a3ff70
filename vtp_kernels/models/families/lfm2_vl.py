"""LFM2-VL: pictures and their tiles, and a short convolution in the place of attention in more than
half of the decoder layers.

What `qwen3_5.py` says of linear attention holds of the convolution, which takes in the rows that
come to it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..towers import UnshuffledTower
from .family import Family
from .looks import Given, Looks, View, cells, whole
from .placing import placed
from .squares import cut_of, pictures_of, tiled
from .tiny import IMAGE, TEXT, Tiny

__all__ = ["Lfm2VL"]


class Lfm2VL(Family):
    name = "lfm2_vl"
    architectures = ("Lfm2VlForConditionalGeneration",)
    text_models = ("lfm2",)
    towers = (UnshuffledTower,)
    example = "LiquidAI/LFM2-VL-1.6B"
    limits = (
        "a convolution has no weights to look at: methods that go by attention decide behind "
        "layers that have it, and VisiPruner, which looks at each, does not run",
        "a token that left is as if it had never come to the convolutions behind; no mask can say "
        "that, so LVPruning has no training here",
        "images that come on top of a cache: one prompt at a time",
    )

    def looks(self, given: Given) -> list[Looks]:
        """A picture is whole, or comes as square tiles of one size, and then mostly once more as a
        whole."""
        side = given.base.config.downsample_factor
        grids = [(rows // side, columns // side) for rows, columns in given.grid("spatial_shapes")]
        if not _may_be_cut(given, grids):
            return [whole(*grid) for grid in grids]
        tiles = [_tiles(given.processor, size) for size in pictures_of(given)]
        alone = len(grids) - sum(rows * columns for rows, columns in tiles)
        cut = sum(rows * columns > 1 for rows, columns in tiles)
        if alone not in (0, cut):
            raise ValueError(
                f"images: the processor makes {len(grids) - alone} tiles of them, and 0 or {cut} "
                f"pictures besides; inputs have {len(grids)} of both together"
            )
        looks, rest = [], iter(grids)
        for rows, columns in tiles:
            first, *_ = of_picture = [next(rest) for _ in range(rows * columns)]
            if rows * columns == 1:
                looks.append(whole(*first))
                continue
            if any(grid != first for grid in of_picture):
                raise ValueError(f"images: tiles of one picture have {of_picture} tokens")
            crops = tiled(cells(*first), rows, columns)
            views, tokens = (View("crops", crops),), crops.numel()
            if alone:
                at_once = tokens + cells(*next(rest))
                views, tokens = (View("whole", at_once), *views), tokens + at_once.numel()
            looks.append(Looks(tokens, views))
        return looks

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration

        vision = {
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_patches": 64,
            "patch_size": 4,
        }

        def make() -> Any:
            return Lfm2VlForConditionalGeneration(
                Lfm2VlConfig(
                    vision_config=vision,
                    text_config=Lfm2Config(**TEXT, full_attn_idxs=[1, 3, 5]),
                    image_token_id=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"lfm2_vl": Tiny(make, patches, linear=True)}


def _may_be_cut(given: Given, grids: list[tuple[int, int]]) -> bool:
    """Whether two squares of one size follow upon each other in a prompt, as tiles do."""
    prompts: dict[int, int] = {}
    for place in placed([h * w for h, w in grids], given.placeholders["image"], copied=True):
        prompts.setdefault(place.index, place.prompt)
    return any(
        prompts[i - 1] == prompts[i] and grids[i - 1] == grids[i] and grids[i][0] == grids[i][1]
        for i in range(1, len(grids))
    )


def _tiles(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles."""
    cut = cut_of(processor, size)
    return int(cut["image_rows"][0]), int(cut["image_cols"][0])


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Patches of a picture, and what fills up their number: 16, 12 or 6 tokens of 2 x 2 of them."""
    height, width = ((8, 8), (4, 12), (6, 4))[index]
    return {
        "pixel_values": torch.randn(1, 64, 48, generator=generator),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(64) < height * width).long()[None],
    }
