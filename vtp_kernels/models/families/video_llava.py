"""Video-LLaVA: pictures as LLaVA-1.5, and videos of eight frames each of which has a CLS token."""

from __future__ import annotations

from typing import Any

from ..looks import Given, Looks
from .family import Family, Modality
from .squares import squares
from .tiny import IMAGE, TEXT, VIDEO, Tiny, clip, square

__all__ = ["VideoLlava"]


class VideoLlava(Family):
    name = "video_llava"
    architectures = ("VideoLlavaForConditionalGeneration",)
    example = "LanguageBind/Video-LLaVA-7B-hf"
    since = "5.23"
    text_models = ("llama",)
    modalities = (
        Modality("image", "pixel_values", "pixel_values_images"),  # the name it had up to 5.22
        Modality("video", "pixel_values_videos"),
    )

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LlamaConfig,
            VideoLlavaConfig,
            VideoLlavaForConditionalGeneration,
        )

        def make() -> Any:
            return VideoLlavaForConditionalGeneration(
                VideoLlavaConfig(
                    vision_config=clip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    video_token_index=VIDEO,
                    image_seq_length=16,
                )
            )

        return {"video_llava": Tiny(make, square(56))}
