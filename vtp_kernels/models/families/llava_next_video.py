"""LLaVA-NeXT-Video: pictures as LLaVA-NeXT; the tokens of a frame are means of four."""

from __future__ import annotations

from typing import Any

from ..towers import NextVideoTower
from .family import Family
from .llava_next import crops_together
from .looks import Box, Given, Looks, Size
from .pooled import pooled_frames
from .squares import shown_by
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo, anyres, clip, frames

__all__ = ["LlavaNextVideo"]


class LlavaNextVideo(Family):
    name = "llava_next_video"
    architectures = ("LlavaNextVideoForConditionalGeneration",)
    example = "llava-hf/LLaVA-NeXT-Video-7B-hf"
    text_models = ("llama", "mistral", "qwen2")
    towers = (NextVideoTower,)

    def looks(self, given: Given) -> list[Looks]:
        return crops_together(given)

    def frames(self, given: Given) -> list[Looks]:
        """Frames are pooled; what is left over at their right and their bottom is not seen."""
        stride = given.base.config.spatial_pool_stride
        side = given.side // stride
        share = side * stride / given.side

        def box(size: Size) -> Box:
            left, top, right, bottom = shown_by(given.video_processor, size)
            return left, top, left + share * (right - left), top + share * (bottom - top)

        return pooled_frames(given, side, box)

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

        return {"llava_next_video": Tiny(make, anyres, video=TinyVideo(frames))}
