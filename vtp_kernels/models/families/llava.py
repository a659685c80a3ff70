"""LLaVA-1.5, and what else is built as it is: BakLLaVA, LLaVA of Llama 3, Pixtral-12B."""

from __future__ import annotations

from typing import Any

from ..looks import WHOLE, Box, Given, Looks, View, centered
from .family import Family
from .rectangles import rectangles
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
    side, pixels = given.side, given.arguments.get("pixel_values")
    shows = given.tower._shows(given.arguments, 1, side * side)
    (tokens,) = (shows >= 0).nonzero(as_tuple=True)
    pictures = sum(given.runs) // len(shows) if pixels is None else len(pixels)
    looks = []
    for index in range(pictures):
        box = WHOLE
        if given.sizes is not None and given.processor is not None and index < len(given.sizes):
            box = _seen(given.processor, *given.sizes[index])
        looks.append(Looks(len(shows), (View("whole", tokens.view(side, side), box),)))
    return looks


def _seen(processor: Any, height: int, width: int) -> Box:
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
