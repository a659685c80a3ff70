"""Idefics 3 and SmolVLM: a picture in tiles and as a whole, with words between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .family import Family
from .tiny import IMAGE, TEXT, Tiny

__all__ = ["Idefics3", "SmolVLM"]


class Idefics3(Family):
    name = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration",)
    text_models = ("llama",)

    def text(self, base: nn.Module) -> nn.Module:
        return base.text_model

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Idefics3Config,
            Idefics3ForConditionalGeneration,
            LlamaConfig,
        )

        def make() -> Any:
            return Idefics3ForConditionalGeneration(
                Idefics3Config(
                    vision_config=VISION,
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                    scale_factor=2,
                )
            )

        return {"idefics3": Tiny(make, tile)}


class SmolVLM(Idefics3):
    name = "smolvlm"
    architectures = ("SmolVLMForConditionalGeneration",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

        def make() -> Any:
            return SmolVLMForConditionalGeneration(
                SmolVLMConfig(
                    vision_config=VISION,
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                    scale_factor=2,
                )
            )

        return {"smolvlm": Tiny(make, tile)}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def tile(generator: torch.Generator, index: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 1, 3, 56, 56, generator=generator)}
