"""EXAONE 4.5: pictures as in Qwen2.5-VL, but positions that count rows; layers with a sliding
window, and others that see all rows and know no positions."""

from __future__ import annotations

from typing import Any

from ..towers import QwenTower
from .cohere2_vision import LIMITS
from .family import Family
from .looks import Given, Looks
from .qwen2_vl import QWEN_VISION, grid, merged, merged_frames, video
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["Exaone45"]


class Exaone45(Family):
    name = "exaone4_5"
    architectures = ("Exaone4_5_ForConditionalGeneration",)
    text_models = ("exaone4",)
    towers = (QwenTower,)
    example = "LGAI-EXAONE/EXAONE-4.5-33B"
    limits = LIMITS

    def looks(self, given: Given) -> list[Looks]:
        return merged(given)

    def frames(self, given: Given) -> list[Looks]:
        return merged_frames(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Exaone4_5_Config,
            Exaone4_5_ForConditionalGeneration,
            Exaone4Config,
        )

        def make() -> Any:
            return Exaone4_5_ForConditionalGeneration(
                Exaone4_5_Config(
                    vision_config=QWEN_VISION
                    | {
                        "num_key_value_heads": 2,
                        "window_size": 16,
                        "fullatt_block_indexes": [1],
                    },
                    text_config=Exaone4Config(
                        **TEXT,
                        sliding_window=8,
                        layer_types=["sliding_attention", "full_attention"] * 3,
                    ),
                    image_token_id=IMAGE,
                    video_token_id=VIDEO,
                )
            )

        return {"exaone4_5": Tiny(make, grid, video=TinyVideo(video))}
