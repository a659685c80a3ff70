"""Ovis 2: tokens of a picture are mixtures of a vocabulary of its own."""

from __future__ import annotations

from typing import Any

from ..towers import OvisTower
from .family import Family
from .looks import Given, Looks
from .squares import squares
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny, square

__all__ = ["Ovis2"]


class Ovis2(Family):
    name = "ovis2"
    architectures = ("Ovis2ForConditionalGeneration",)
    example = "thisisiron/Ovis2-2B-hf"
    text_models = ("qwen2",)
    towers = (OvisTower,)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

        def make() -> Any:
            return Ovis2ForConditionalGeneration(
                Ovis2Config(
                    vision_config=VISION
                    | SQUARE
                    | {
                        "vocab_size": 20,
                        "num_visual_indicator_tokens": 5,
                        "hidden_stride": 1,
                    },
                    text_config=Qwen2Config(**TEXT),
                    image_token_id=IMAGE,
                    visual_indicator_token_ids=[90, 91, 92, 93, 94],
                    hidden_size=64,
                    vocab_size=100,
                )
            )

        return {"ovis2": Tiny(make, square(56))}
