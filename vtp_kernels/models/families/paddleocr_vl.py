"""PaddleOCR-VL: pictures keep their shape, and a token shows a square of patches."""

from __future__ import annotations

from typing import Any

import torch

from ..towers import PaddleTower
from .family import Family
from .looks import Given, Looks
from .qwen2_vl import ROPE, flat_grid, merged
from .tiny import IMAGE, TEXT, VIDEO, Tiny

__all__ = ["PaddleOcrVL"]


class PaddleOcrVL(Family):
    name = "paddleocr_vl"
    architectures = ("PaddleOCRVLForConditionalGeneration",)
    example = "PaddlePaddle/PaddleOCR-VL"
    text_models = ("paddleocr_vl_text",)
    towers = (PaddleTower,)
    grid_positions = True

    def looks(self, given: Given) -> list[Looks]:
        return merged(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

        def make() -> Any:
            return PaddleOCRVLForConditionalGeneration(
                PaddleOCRVLConfig(
                    vision_config={
                        "hidden_size": 32,
                        "intermediate_size": 64,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "image_size": 32,
                        "patch_size": 4,
                    },
                    text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE},
                    image_token_id=IMAGE,
                    video_token_id=VIDEO,
                    vision_start_token_id=96,
                    vision_end_token_id=97,
                )
            )

        return {"paddleocr_vl": Tiny(make, patches, types=("mm_token_type_ids",))}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Those of a Qwen picture, each by itself a picture."""
    flat = flat_grid(generator, index)
    return flat | {"pixel_values": flat["pixel_values"].view(-1, 3, 4, 4)}
