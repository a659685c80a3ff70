"""LLaVA-1.5, and what else is built as it is: BakLLaVA, LLaVA of Llama 3, Pixtral-12B."""

from __future__ import annotations

from typing import Any

from ..towers import PixtralTower, Tower
from .family import Family
from .looks import Given, Looks, View
from .rectangles import rectangles
from .squares import shown_by
from .tiny import EXPERTS, IMAGE, LINEAR, PIXTRAL, SHARED, TEXT, Tiny, any_size, clip, square

__all__ = ["Llava"]


class Llava(Family):
    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)
    example = "llava-hf/llava-1.5-7b-hf"
    text_models = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "apertus",
        "cohere",
        "ernie4_5",
        "gemma",
        "glm4",
        "granite",
        "ministral3",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "starcoder2",
    )
    towers = (Tower, PixtralTower)

    def looks(self, given: Given) -> list[Looks]:
        # Pixtral: pictures that keep their shape.
        return rectangles(given) if "image_sizes" in given.arguments else _squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            MistralConfig,
            PixtralVisionConfig,
            Qwen3NextConfig,
        )

        def make(text: Any = None) -> Any:
            return LlavaForConditionalGeneration(
                LlavaConfig(
                    vision_config=clip(),
                    text_config=text or LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    image_seq_length=16,
                )
            )

        def pixtral() -> Any:
            return LlavaForConditionalGeneration(
                LlavaConfig(
                    vision_config=PixtralVisionConfig(**PIXTRAL),
                    text_config=MistralConfig(**TEXT, sliding_window=None),
                    image_token_index=IMAGE,
                    vision_feature_layer=-1,
                    vision_feature_select_strategy="full",
                )
            )

        return {
            "llava": Tiny(make, square(56)),
            "llava_pixtral": Tiny(pixtral, any_size),
            "llava_qwen3_next": Tiny(
                lambda: make(Qwen3NextConfig(**TEXT | EXPERTS | LINEAR | SHARED)),
                square(56),
                linear=True,
            ),
        }


def _squares(given: Given) -> list[Looks]:
    """Every picture as one square, perhaps with CLS before it."""
    side, outline = given.side, given.told("image")
    shows = given.tower.shows(given.arguments, 1, side * side)
    (tokens,) = (shows >= 0).nonzero(as_tuple=True)
    boxes = (shown_by(given.processor, given.size_of(i)) for i in range(outline.parts))
    cells = tokens.view(side, side)
    return [Looks(len(shows), (View("whole", cells, box),)) for box in boxes]
