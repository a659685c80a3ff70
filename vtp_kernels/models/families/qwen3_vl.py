"""Qwen3-VL, dense and with experts: as Qwen2.5-VL, with more features of the vision tower after
each of its first layers, and a timestamp before each frame of a video."""

from __future__ import annotations

from typing import Any

from ..deepstack import Planes
from ..looks import Given, Looks
from .family import Family
from .qwen2_vl import QWEN_TOKENS, QWEN_VISION, ROPE, grid, merged
from .tiny import EXPERTS, TEXT, Tiny

__all__ = ["Qwen3VL", "Qwen3VLMoe"]


class Qwen3VL(Family):
    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)
    text_models = ("qwen3_vl_text",)
    grid_positions = True

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        features = arguments.get("deepstack_visual_embeds")
        if features is None or first >= len(features):
            return None
        arguments["deepstack_visual_embeds"] = None
        return Planes(arguments["visual_pos_masks"], features)

    def looks(self, given: Given) -> list[Looks]:
        return merged(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        def make() -> Any:
            return Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(
                    vision_config=DEEPSTACK_VISION,
                    text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen3_vl": Tiny(make, grid, types="mm_token_type_ids")}


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"
    architectures = ("Qwen3VLMoeForConditionalGeneration",)
    text_models = ("qwen3_vl_moe_text",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        def make() -> Any:
            return Qwen3VLMoeForConditionalGeneration(
                Qwen3VLMoeConfig(
                    vision_config=DEEPSTACK_VISION,
                    text_config=TEXT | EXPERTS | {"head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen3_vl_moe": Tiny(make, grid, types="mm_token_type_ids")}


DEEPSTACK_VISION = QWEN_VISION | {
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
