"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT; the tokens of a frame are means of four."""

from __future__ import annotations

from typing import Any

from ..looks import Given, Looks
from .family import Family
from .llava_next import crops_together
from .tiny import IMAGE, TEXT, VIDEO, Tiny, anyres, clip

__all__ = ["LlavaNextVideo"]


class LlavaNextVideo(Family):
    name = "llava_next_video"
    architectures = ("LlavaNextVideoForConditionalGeneration",)
    example = "llava-hf/LLaVA-NeXT-Video-7B-hf"
    text_models = ("llama", "mistral", "qwen2")

    def looks(self, given: Given) -> list[Looks]:
        return crops_together(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LlamaConfig,
            LlavaNextVideoConfig,
            LlavaNextVideoForConditionalGeneration,
        )

        def make() -> Any:
            return LlavaNextVideoForConditionalGeneration(
                LlavaNextVideoConfig(
                    vision_config=clip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    video_token_index=VIDEO,
                    image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
                )
            )

        return {"llava_next_video": Tiny(make, anyres)}
