"""Aria: tokens that ask a picture for what they show, so that they have no place in it."""

from __future__ import annotations

from typing import Any

from ..towers import AskingTower
from .family import Family
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny, square

__all__ = ["Aria"]


class Aria(Family):
    name = "aria"
    architectures = ("AriaForConditionalGeneration",)
    example = "rhymes-ai/Aria"
    text_models = ("aria_text",)
    towers = (AskingTower,)
    resampled = True

    def tiny(self) -> dict[str, Tiny]:
        from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig

        vision = SQUARE | {"model_type": "idefics3_vision"}

        def make() -> Any:
            return AriaForConditionalGeneration(
                AriaConfig(
                    vision_config=VISION | vision,
                    text_config=AriaTextConfig(
                        **TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
                    ),
                    image_token_index=IMAGE,
                    projector_patch_to_query_dict={16: 16},
                )
            )

        return {"aria": Tiny(make, square(56))}
