"""ViP-LLaVA: as LLaVA-1.5, with the features of several layers of the vision tower side by side."""

from __future__ import annotations

from typing import Any

from ..towers import VipTower
from .family import Family
from .looks import Given, Looks
from .squares import cropped_squares
from .tiny import IMAGE, TEXT, Tiny, clip, square

__all__ = ["VipLlava"]


class VipLlava(Family):
    name = "vipllava"
    architectures = ("VipLlavaForConditionalGeneration",)
    example = "llava-hf/vip-llava-7b-hf"
    text_models = ("llama",)
    towers = (VipTower,)

    def looks(self, given: Given) -> list[Looks]:
        return cropped_squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

        def make() -> Any:
            return VipLlavaForConditionalGeneration(
                VipLlavaConfig(
                    vision_config=clip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    vision_feature_layers=[-1, -2],
                )
            )

        return {"vipllava": Tiny(make, square(56))}
