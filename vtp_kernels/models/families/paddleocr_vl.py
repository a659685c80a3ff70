"""PaddleOCR-VL: pictures keep their shape, and a token shows a square of patches."""

from __future__ import annotations

from typing import Any

import torch

from ..looks import Given, Looks
from .family import Family
from .qwen2_vl import ROPE, merged
from .tiny import IMAGE, TEXT, VIDEO, Tiny

__all__ = ["PaddleOcrVL"]


class PaddleOcrVL(Family):
    name = "paddleocr_vl"
    architectures = ("PaddleOCRVLForConditionalGeneration",)
    example = "PaddlePaddle/PaddleOCR-VL"
    text_models = ("paddleocr_vl_text",)
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
    """Pictures of 16, 12 or 6 tokens of 2 x 2 patches each."""
    height, width = ((8, 8), (4, 12), (6, 4))[index]
    return {
        "pixel_values": torch.randn(height * width, 3, 4, 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
