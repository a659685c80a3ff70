"""Granite 4 Vision: crops as LLaVA-NeXT, whose features come in between the layers.

At the first layer a visual token has features of one layer of the vision tower; others are added
before later ones, up to layer 21 in the released model. Until then it holds less than it will.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ..towers import QueriedTower
from .deepstack import Planes
from .family import Family
from .llava_next import crops_together
from .looks import Given, Looks
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny, anyres

__all__ = ["Granite4Vision"]


class Granite4Vision(Family):
    name = "granite4_vision"
    architectures = ("Granite4VisionForConditionalGeneration",)
    since = "5.23"
    text_models = ("granite4_vision_text",)
    towers = (QueriedTower,)

    def looks(self, given: Given) -> list[Looks]:
        """A token asks a window of patches, by those of its own cell."""
        fewer = Fraction(given.base.config.downsample_rate)
        return crops_together(given, side=int(given.side * fewer))

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        features = arguments.get("deepstack_features")
        if not features or first >= max(features):
            return None
        arguments["deepstack_features"] = None
        return Planes(arguments["vision_mask"][..., 0], features)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            CLIPVisionConfig,
            Granite4VisionConfig,
            Granite4VisionForConditionalGeneration,
        )

        vision = VISION | SQUARE | {"hidden_size": 64}

        def make() -> Any:
            return Granite4VisionForConditionalGeneration(
                Granite4VisionConfig(
                    vision_config=CLIPVisionConfig(**vision),
                    text_config=TEXT | {"attention_multiplier": 0.25},
                    qformer_config={
                        "model_type": "blip_2_qformer",
                        "num_hidden_layers": 1,
                        "intermediate_size": 64,
                        "cross_attention_frequency": 1,
                        "vocab_size": 10,
                    },
                    image_token_index=IMAGE,
                    image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
                    downsample_rate="1/2",
                    deepstack_layer_map=[[-2, 0], [-1, 2]],
                    spatial_target_layers=[1, 3, 4, 5],
                )
            )

        return {"granite4_vision": Tiny(make, anyres)}
