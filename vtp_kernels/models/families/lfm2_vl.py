"""LFM2-VL: pictures and their tiles, and a short convolution in the place of attention in more than
half of the decoder layers.

What `qwen3_5.py` says of linear attention holds of the convolution, which takes in the rows that
come to it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..towers import UnshuffledTower
from .family import Family
from .tiny import IMAGE, TEXT, Tiny

__all__ = ["Lfm2VL"]


class Lfm2VL(Family):
    name = "lfm2_vl"
    architectures = ("Lfm2VlForConditionalGeneration",)
    text_models = ("lfm2",)
    towers = (UnshuffledTower,)
    example = "LiquidAI/LFM2-VL-1.6B"
    limits = (
        "a convolution has no weights to look at: methods that go by attention decide behind "
        "layers that have it, and VisiPruner, which looks at each, does not run",
        "a token that left is as if it had never come to the convolutions behind; no mask can say "
        "that, so LVPruning has no training here",
        "images that come on top of a cache: one prompt at a time",
    )

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration

        vision = {
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_patches": 64,
            "patch_size": 4,
        }

        def make() -> Any:
            return Lfm2VlForConditionalGeneration(
                Lfm2VlConfig(
                    vision_config=vision,
                    text_config=Lfm2Config(**TEXT, full_attn_idxs=[1, 3, 5]),
                    image_token_id=IMAGE,
                    downsample_factor=2,
                )
            )

        return {"lfm2_vl": Tiny(make, patches, linear=True)}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Patches of a picture, and what fills up their number: 16, 12 or 6 tokens of 2 x 2 of them."""
    height, width = ((8, 8), (4, 12), (6, 4))[index]
    return {
        "pixel_values": torch.randn(1, 64, 48, generator=generator),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(64) < height * width).long()[None],
    }
