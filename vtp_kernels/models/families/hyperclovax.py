"""HyperCLOVA X Vision: the vision tower of Qwen2.5-VL with a text model that counts positions."""

from __future__ import annotations

from typing import Any

from ..towers import HyperClovaTower
from .qwen2_vl import QWEN_VISION, ByGrid, grid, video
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["HyperClovaX"]


class HyperClovaX(ByGrid):
    name = "hyperclovax_vision_v2"
    architectures = ("HyperCLOVAXVisionV2ForConditionalGeneration",)
    example = "naver-hyperclovax/HyperCLOVAX-SEED-Think-32B"
    since = "5.23"
    text_models = ("hyperclovax",)
    towers = (HyperClovaTower,)
    grid_positions = False

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            HyperCLOVAXVisionV2Config,
            HyperCLOVAXVisionV2ForConditionalGeneration,
        )

        vision = {"model_type": "qwen2_5_vl_vision", "window_size": 16}

        def make() -> Any:
            return HyperCLOVAXVisionV2ForConditionalGeneration(
                HyperCLOVAXVisionV2Config(
                    vision_config=QWEN_VISION | vision | {"fullatt_block_indexes": [1]},
                    text_config=TEXT | {"model_type": "hyperclovax"},
                    image_token_id=IMAGE,
                    video_token_id=VIDEO,
                )
            )

        return {"hyperclovax_vision_v2": Tiny(make, grid, video=TinyVideo(video))}
