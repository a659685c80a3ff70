"""Qwen3-VL: as Qwen2.5-VL, with more features of the vision tower after each of its first layers,
and a timestamp before each frame of a video."""

from __future__ import annotations

from typing import Any

from ..deepstack import Planes
from ..looks import Given, Looks
from .family import Family
from .qwen2_5_vl import QWEN_TOKENS, QWEN_VISION, ROPE, grid, merged
from .tiny import TEXT, Tiny

__all__ = ["Qwen3VL", "take_deepstack"]


class Qwen3VL(Family):
    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)
    text_models = ("qwen3_vl_text",)
    grid_positions = True

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        return take_deepstack(arguments, first)

    def looks(self, given: Given) -> list[Looks]:
        return merged(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        def make() -> Any:
            return Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(
                    vision_config=QWEN_VISION
                    | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
                    text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen3_vl": Tiny(make, grid, types="mm_token_type_ids")}


def take_deepstack(arguments: dict[str, Any], first: int) -> Planes | None:
    features = arguments.get("deepstack_visual_embeds")
    if features is None or first >= len(features):
        return None
    arguments["deepstack_visual_embeds"] = None
    return Planes(arguments["visual_pos_masks"], features)
