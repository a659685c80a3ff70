"""LLaVA-OneVision: as LLaVA-NeXT, but pictures are cut only where a prompt has just one."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..towers import ResizedTower
from .family import Family
from .llava_next import crops_together
from .looks import Given, Looks
from .pooled import pooled_frames
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo, anyres, frames, siglip

__all__ = ["LlavaOnevision"]


class LlavaOnevision(Family):
    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)
    example = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    text_models = ("qwen2",)
    towers = (ResizedTower,)

    def looks(self, given: Given) -> list[Looks]:
        counts = given.arguments.get("batch_num_images")
        if counts is None:
            return crops_together(given)
        numbers = torch.as_tensor(counts).tolist()
        return crops_together(given, [n == 1 for n in numbers for _ in range(n)])

    def frames(self, given: Given) -> list[Looks]:
        """Frames are halved in height and width; behind the last one comes an `image_newline`."""
        return pooled_frames(given, math.ceil(given.side / 2), newlines=1)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
        )

        def make() -> Any:
            return LlavaOnevisionForConditionalGeneration(
                LlavaOnevisionConfig(
                    vision_config=siglip(),
                    text_config=Qwen2Config(**TEXT),
                    image_token_index=IMAGE,
                    video_token_index=VIDEO,
                    image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
                )
            )

        return {"llava_onevision": Tiny(make, anyres, video=TinyVideo(frames))}
