"""Command-A Vision and Aya Vision: layers with a sliding window and rotary positions, and others
that see all rows and know no positions."""

from __future__ import annotations

from typing import Any

from ..towers import AyaTower, CohereTower
from .family import Family
from .tiny import IMAGE, TEXT, VISION, Tiny, square

__all__ = ["AyaVision", "Cohere2Vision"]

LIMITS = (
    "VisiPruner: no passive visual tokens in layers with a sliding window",
    "a StaticCache must be shorter than the sliding window",
)


class Cohere2Vision(Family):
    name = "cohere2_vision"
    architectures = ("Cohere2VisionForConditionalGeneration",)
    text_models = ("cohere2",)
    towers = (CohereTower,)
    example = "CohereLabs/command-a-vision-07-2025"
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

        def make() -> Any:
            return Cohere2VisionForConditionalGeneration(
                Cohere2VisionConfig(
                    vision_config=_tower(),
                    text_config=_text(["sliding_attention", "full_attention"] * 3),
                    image_token_id=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"cohere2_vision": Tiny(make, square(112))}


class AyaVision(Family):
    name = "aya_vision"
    architectures = ("AyaVisionForConditionalGeneration",)
    text_models = ("cohere2",)
    towers = (AyaTower,)
    example = "CohereLabs/aya-vision-8b"
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

        def make() -> Any:
            return AyaVisionForConditionalGeneration(
                AyaVisionConfig(
                    vision_config=_tower(),
                    text_config=_text(["full_attention"] * 4 + ["sliding_attention"] * 2),
                    image_token_index=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"aya_vision": Tiny(make, square(112))}


def _tower() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION, image_size=112, patch_size=14, vision_use_head=False)


def _text(layer_types: list[str]) -> Any:
    from transformers import Cohere2Config

    return Cohere2Config(**TEXT, sliding_window=8, layer_types=layer_types)
