"""Granite Docling: as Idefics 3, with more features of the vision tower after its first layers."""

from __future__ import annotations

from typing import Any

import torch

from ..towers import DoclingTower
from .deepstack import Planes
from .idefics3 import Idefics3, tile
from .looks import Given, Looks
from .qwen3_vl import take_deepstack
from .squares import folded, tiles_of, tiles_then_whole
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny

__all__ = ["GraniteDocling"]


class GraniteDocling(Idefics3):
    name = "granite_docling"
    architectures = ("GraniteDoclingForConditionalGeneration",)
    example = "ibm-granite/granite-for-docling-500m"
    since = "5.23"
    text_models = ("granite_docling_text",)
    towers = (DoclingTower,)

    def looks(self, given: Given) -> list[Looks]:
        """A tile shows fewer or more patches a token, by which of two ways it takes."""
        order = folded(given)
        return [
            tiles_then_whole(order, rows * columns, rows, columns)
            for rows, columns in tiles_of(given, order.numel(), _cut)
        ]

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        return take_deepstack(arguments, first)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import GraniteDoclingConfig, GraniteDoclingForConditionalGeneration

        def make() -> Any:
            return GraniteDoclingForConditionalGeneration(
                GraniteDoclingConfig(
                    vision_config=VISION
                    | SQUARE
                    | {
                        "out_hidden_size": 64,
                        "scale_factor": 2,
                        "deepstack_visual_indexes": [0, 1],
                    },
                    text_config=TEXT,
                    image_token_id=IMAGE,
                )
            )

        return {"granite_docling": Tiny(make, real_tile)}


def _cut(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    return processor.get_tile_grid(*size)


def real_tile(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Tiles that fill up a batch are said to be none."""
    tiles = tile(generator, index)
    return tiles | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
