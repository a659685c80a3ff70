"""Mistral Small 3.1 and later, and LightOnOCR: pictures keep their shape, and a token shows a
square of patches."""

from __future__ import annotations

from typing import Any

from ..towers import LightOnTower, MergedPixtralTower
from .family import Family
from .looks import Given, Looks
from .rectangles import rectangles
from .tiny import IMAGE, PIXTRAL, TEXT, Tiny, any_size

__all__ = ["LightOnOcr", "Mistral3"]


class Mistral3(Family):
    name = "mistral3"
    architectures = ("Mistral3ForConditionalGeneration",)
    example = "mistralai/Mistral-Small-3.1-24B-Instruct-2503"
    text_models = ("mistral", "ministral3")
    towers = (MergedPixtralTower,)

    def looks(self, given: Given) -> list[Looks]:
        return rectangles(given, given.base.config.spatial_merge_size)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Ministral3Config,
            Mistral3Config,
            Mistral3ForConditionalGeneration,
            PixtralVisionConfig,
        )

        # Queries get longer every so many positions: tiny prompts are to have some of them.
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        }

        def make() -> Any:
            return Mistral3ForConditionalGeneration(
                Mistral3Config(
                    vision_config=PixtralVisionConfig(**PIXTRAL),
                    text_config=Ministral3Config(**TEXT, head_dim=16, rope_parameters=rope),
                    image_token_index=IMAGE,
                    spatial_merge_size=2,
                )
            )

        return {"mistral3": Tiny(make, any_size)}


class LightOnOcr(Mistral3):
    name = "lighton_ocr"
    architectures = ("LightOnOcrForConditionalGeneration",)
    example = "lightonai/LightOnOCR-1B-1025"
    text_models = ("qwen3",)
    towers = (LightOnTower,)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LightOnOcrConfig,
            LightOnOcrForConditionalGeneration,
            PixtralVisionConfig,
            Qwen3Config,
        )

        def make() -> Any:
            return LightOnOcrForConditionalGeneration(
                LightOnOcrConfig(
                    vision_config=PixtralVisionConfig(**PIXTRAL),
                    text_config=Qwen3Config(**TEXT, head_dim=16),
                    image_token_id=IMAGE,
                    spatial_merge_size=2,
                )
            )

        return {"lighton_ocr": Tiny(make, any_size)}
