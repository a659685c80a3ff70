"""ERNIE 4.5 VL: as Qwen2-VL, with experts of their own for visual tokens."""

from __future__ import annotations

from typing import Any

from ..towers import ErnieTower
from .looks import Given, Looks
from .qwen2_vl import ROPE, ByGrid, flat_grid, flat_video, merged_frames
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["Ernie45VL"]


class Ernie45VL(ByGrid):
    name = "ernie4_5_vl_moe"
    architectures = ("Ernie4_5_VLMoeForConditionalGeneration",)
    example = "baidu/ERNIE-4.5-VL-28B-A3B-PT"
    text_models = ("ernie4_5_vl_moe_text",)
    towers = (ErnieTower,)
    row_arguments = ("moe_mm_token_type_ids",)

    def frames(self, given: Given) -> list[Looks]:
        return merged_frames(given, given.base.config.vision_config.temporal_merge_size)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
        rope = ROPE | {"mrope_section": [3, 3, 2]}
        experts = {"moe_intermediate_size": [32, 16], "moe_k": 2, "moe_num_experts": 4}

        def make() -> Any:
            return Ernie4_5_VLMoeForConditionalGeneration(
                Ernie4_5_VLMoeConfig(
                    vision_config=vision | {"intermediate_size": 64},
                    text_config=TEXT | experts | {"rope_parameters": rope},
                    image_token_id=IMAGE,
                    video_token_id=VIDEO,
                    image_start_token_id=96,
                    image_end_token_id=97,
                    video_start_token_id=94,
                    video_end_token_id=95,
                )
            )

        frames = TinyVideo(flat_video, around=(94, 95))
        types = ("mm_token_type_ids", "moe_mm_token_type_ids")
        return {"ernie4_5_vl_moe": Tiny(make, flat_grid, types=types, video=frames)}
