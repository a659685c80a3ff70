"""Idefics 2, Idefics 3 and SmolVLM: a picture as a whole, and from Idefics 3 on in tiles, with
words between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..towers import IdeficsTower, PerceiverTower
from .family import Family
from .looks import Given, Looks, cells
from .squares import cut_of, tiles_of, tiles_then_whole
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny

__all__ = ["Idefics2", "Idefics3", "SmolVLM", "tile"]


class Idefics3(Family):
    name = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration",)
    example = "HuggingFaceM4/Idefics3-8B-Llama3"
    text_models = ("llama",)
    towers = (IdeficsTower,)

    def text(self, base: nn.Module) -> nn.Module:
        return base.text_model

    def looks(self, given: Given) -> list[Looks]:
        side = given.side // given.base.config.scale_factor
        return [
            tiles_then_whole(cells(side, side), rows * columns, rows, columns)
            for rows, columns in tiles_of(given, side * side, _cut)
        ]

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Idefics3Config,
            Idefics3ForConditionalGeneration,
            LlamaConfig,
        )

        def make() -> Any:
            return Idefics3ForConditionalGeneration(
                Idefics3Config(
                    vision_config=VISION | SQUARE,
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                    scale_factor=2,
                )
            )

        return {"idefics3": Tiny(make, tile)}


class Idefics2(Idefics3):
    """Its tokens are of the whole picture, each by what it asked for: they have no place in it."""

    name = "idefics2"
    architectures = ("Idefics2ForConditionalGeneration",)
    example = "HuggingFaceM4/idefics2-8b"
    text_models = ("mistral",)
    towers = (PerceiverTower,)
    limits = (f"InflectionPruning by source='attention': {PerceiverTower.unscored}",)
    resampled = True
    looks = Family.looks

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Idefics2Config,
            Idefics2ForConditionalGeneration,
            MistralConfig,
        )

        def make() -> Any:
            return Idefics2ForConditionalGeneration(
                Idefics2Config(
                    vision_config=VISION | SQUARE,
                    perceiver_config={
                        "hidden_size": 64,
                        "resampler_n_latents": 8,
                        "resampler_depth": 1,
                        "resampler_n_heads": 4,
                        "resampler_head_dim": 16,
                        "num_key_value_heads": 2,
                    },
                    text_config=MistralConfig(**TEXT, sliding_window=None),
                    image_token_id=IMAGE,
                )
            )

        return {"idefics2": Tiny(make, tile)}


class SmolVLM(Idefics3):
    name = "smolvlm"
    architectures = ("SmolVLMForConditionalGeneration",)
    example = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

        def make() -> Any:
            return SmolVLMForConditionalGeneration(
                SmolVLMConfig(
                    vision_config=VISION | SQUARE,
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                    scale_factor=2,
                )
            )

        return {"smolvlm": Tiny(make, tile)}


def _cut(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles."""
    cut = cut_of(processor, size)
    return int(cut["rows"][0][0]), int(cut["cols"][0][0])


def tile(generator: torch.Generator, index: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 1, 3, 56, 56, generator=generator)}
