"""VideoLLaMA 3: pictures and frames keep their shape; what is alike in frames that follow each
other comes once."""

from __future__ import annotations

from typing import Any

import torch

from .family import Family
from .looks import Given, Looks, whole
from .qwen2_vl import flat_grid
from .tiny import IMAGE, TEXT, VIDEO, VISION, Tiny

__all__ = ["VideoLlama3"]


class VideoLlama3(Family):
    name = "video_llama_3"
    architectures = ("VideoLlama3ForConditionalGeneration",)
    example = "lkhl/VideoLLaMA3-2B-Image-HF"
    text_models = ("qwen2",)

    def looks(self, given: Given) -> list[Looks]:
        """Every picture says how many patches, side by side and below each other, are a token."""
        looks = []
        grids, merges = given.grid("image_grid_thw"), given.grid("image_merge_sizes")
        for (_, height, width), merge in zip(grids, merges, strict=True):
            looks.append(whole(height // merge, width // merge))
        return looks

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Qwen2Config,
            VideoLlama3Config,
            VideoLlama3ForConditionalGeneration,
        )

        def make() -> Any:
            return VideoLlama3ForConditionalGeneration(
                VideoLlama3Config(
                    vision_config=VISION | {"patch_size": 4},
                    text_config=Qwen2Config(**TEXT),
                    image_token_id=IMAGE,
                    video_token_id=VIDEO,
                )
            )

        return {"video_llama_3": Tiny(make, patches)}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    return flat_grid(generator, index) | {"image_merge_sizes": torch.tensor([2])}
