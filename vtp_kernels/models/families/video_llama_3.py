"""VideoLLaMA 3: pictures and frames keep their shape; what is alike in frames that follow each
other comes once."""

from __future__ import annotations

from typing import Any

import torch

from ..towers import ScaledTower
from .family import Family
from .looks import Given, Looks, whole
from .qwen2_vl import flat_grid, flat_video
from .tiny import IMAGE, TEXT, VIDEO, VISION, Tiny, TinyVideo

__all__ = ["VideoLlama3"]


class VideoLlama3(Family):
    name = "video_llama_3"
    architectures = ("VideoLlama3ForConditionalGeneration",)
    example = "lkhl/VideoLLaMA3-2B-Image-HF"
    text_models = ("qwen2",)
    towers = (ScaledTower,)

    def looks(self, given: Given) -> list[Looks]:
        """Every picture says how many patches, side by side and below each other, are a token."""
        looks = []
        grids, merges = given.grid("image_grid_thw"), given.grid("image_merge_sizes")
        for (_, height, width), merge in zip(grids, merges, strict=True):
            looks.append(whole(height // merge, width // merge))
        return looks

    def frames(self, given: Given) -> list[Looks]:
        """A frame has no tokens for what is as in the frame before: then it is not told which are
        left, only how many."""
        mask = given.arguments.get("video_compression_mask")
        here = None if mask is None else torch.as_tensor(mask).bool().cpu()
        looks, first = [], 0
        grids, merges = given.grid("video_grid_thw"), given.grid("video_merge_sizes")
        for video, ((time, height, width), merge) in enumerate(zip(grids, merges, strict=True)):
            every = whole(height // merge, width // merge)
            for frame in range(time):
                left = every.tokens
                if here is not None:
                    left = int(here[first : first + every.tokens].sum())
                look = every if left == every.tokens else Looks(left, ())
                looks.append(look._replace(video=video, frames=range(frame, frame + 1)))
                first += every.tokens
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

        frames = TinyVideo(merged_video, before=(60, 61))  # its time in words
        return {"video_llama_3": Tiny(make, patches, video=frames)}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    return flat_grid(generator, index) | {"image_merge_sizes": torch.tensor([2])}


def merged_video(generator: torch.Generator, index: int) -> dict[str, Any]:
    return flat_video(generator, index) | {"video_merge_sizes": torch.tensor([2])}
