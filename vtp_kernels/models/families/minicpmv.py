"""MiniCPM-V 4.6 and 4.7, and MiniCPM-OCR: pictures and their slices before the language model
of Qwen3.5.

What `qwen3_5.py` says of layers with linear attention holds here. In 4.7 a visual token's position
is a place on a canvas, in the others it counts rows.
"""

from __future__ import annotations

from typing import Any

import torch

from ..towers import MiniCPMTower
from .family import Family
from .qwen3_5 import LIMITS, ROTARY
from .tiny import IMAGE, LINEAR, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["MiniCPMOcr", "MiniCPMV46", "MiniCPMV47"]


class MiniCPMV46(Family):
    name = "minicpmv4_6"
    architectures = ("MiniCPMV4_6ForConditionalGeneration",)
    text_models = ("qwen3_5_text",)
    towers = (MiniCPMTower,)
    example = "openbmb/MiniCPM-V-4.6"
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

        def make() -> Any:
            return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**CONFIG))

        return {"minicpmv4_6": Tiny(make, squares, **SIDE_BY_SIDE)}


class MiniCPMV47(Family):
    name = "minicpmv4_7"
    architectures = ("MiniCPMV4_7ForConditionalGeneration",)
    text_models = ("qwen3_5_text",)
    towers = (MiniCPMTower,)
    example = "openbmb/MiniCPM-V-4.7-1B"
    since = "5.23"
    grid_positions = True
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

        def make() -> Any:
            return MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**CONFIG, **MARKS))

        types = ("mm_token_type_ids",)
        return {"minicpmv4_7": Tiny(make, patches, types, **SIDE_BY_SIDE)}


class MiniCPMOcr(Family):
    name = "minicpm_ocr"
    architectures = ("MiniCPMOcrForConditionalGeneration",)
    text_models = ("qwen3_5_text",)
    towers = (MiniCPMTower,)
    example = "openbmb/MiniCPM-OCR-1.0"
    since = "5.23"
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration

        def make() -> Any:
            config = MiniCPMOcrConfig(**CONFIG, downsample_mode="16x")
            return MiniCPMOcrForConditionalGeneration(config)

        return {"minicpm_ocr": Tiny(make, patches, **SIDE_BY_SIDE)}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
}
CONFIG = {
    "vision_config": VISION,
    "insert_layer_id": 1,
    "text_config": TEXT | LINEAR | ROTARY | {"model_type": "qwen3_5_text"},
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
MARKS = {
    "image_start_id": 96,
    "image_end_id": 97,
    "slice_start_id": 94,
    "slice_end_id": 95,
    "newline_id": 93,
}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Patches of a picture, side by side: 16, 12 or 6 tokens of 4 x 4 of them."""
    height, width = ((16, 16), (8, 24), (12, 8))[index]
    return {
        "pixel_values": torch.randn(1, 3, 4, 4 * height * width, generator=generator),
        "target_sizes": torch.tensor([[height, width]]),
    }


def frames(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Videos of 2, 3 or 64 frames of 8, 4 or 1 tokens."""
    count, height, width = ((2, 8, 16), (3, 8, 8), (64, 4, 4))[index]
    pixels = 4 * count * height * width
    return {
        "pixel_values_videos": torch.randn(1, 3, 4, pixels, generator=generator),
        "target_sizes_videos": torch.tensor([[height, width]] * count),
    }


SIDE_BY_SIDE: dict[str, Any] = {
    "linear": True,
    "side_by_side": True,
    "video": TinyVideo(frames, before=(96,), after=(97,)),
}


def squares(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Of one size: transformers 5.17 takes no others in one call."""
    return patches(generator, 0)
