"""Cosmos 3 Edge: as Qwen2-VL, with another vision tower."""

from __future__ import annotations

from typing import Any

from ..towers import QwenTower
from .qwen2_vl import QWEN_TOKENS, ROPE, ByGrid, flat_grid, flat_video
from .tiny import TEXT, VISION, Tiny, TinyVideo

__all__ = ["Cosmos3Edge"]


class Cosmos3Edge(ByGrid):
    name = "cosmos3_edge"
    architectures = ("Cosmos3EdgeForConditionalGeneration",)
    example = "nvidia/Cosmos3-Edge"
    text_models = ("cosmos3_edge_text",)
    towers = (QwenTower,)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Cosmos3EdgeConfig,
            Cosmos3EdgeForConditionalGeneration,
            Cosmos3EdgeTextConfig,
        )

        def make() -> Any:
            return Cosmos3EdgeForConditionalGeneration(
                Cosmos3EdgeConfig(
                    vision_config=VISION | {"patch_size": 4, "num_patches": 64},
                    text_config=Cosmos3EdgeTextConfig(**TEXT, head_dim=16, rope_parameters=ROPE),
                    projector_hidden_size=64,
                    **QWEN_TOKENS,
                )
            )

        # Before each frame its time in words, and where vision starts.
        frames = TinyVideo(flat_video, before=(60, 61, 62, 96), after=(97,))
        types = ("mm_token_type_ids",)
        return {"cosmos3_edge": Tiny(make, flat_grid, types=types, video=frames)}
