"""Qwen3.5: pictures as in Qwen3-VL, without more features for early layers. In three of four
decoder layers attention is linear.

Tokens may leave before any layer. Layers of full attention then do what they would do with the
tokens masked. Those of linear attention take in the rows that come to them, in order: a token that
left is as if it had never come, which no mask can say, and which `linear.py` tells more of. Where
tokens leave before layer 0, all that is the model given the shorter input with the same positions.
"""

from __future__ import annotations

from typing import Any

from ..towers import QwenTower
from .qwen2_vl import QWEN_TOKENS, QWEN_VISION, ROPE, ByGrid, grid
from .qwen3_vl import WITH_TIMES
from .tiny import EXPERTS, LINEAR, SHARED, TEXT, Tiny

__all__ = ["LIMITS", "ROTARY", "Qwen35", "Qwen35Moe"]

LIMITS = (
    "linear attention has no weights to look at: methods decide before layers 4, 8, 12 ... (after "
    "one of full attention) where they go by attention, and nowhere where they go by each layer's "
    "(VisiPruner, but for decision='fixed' without its shallow stage)",
    "in layers with linear attention a token that left is as if it had never come; no mask can say "
    "that, so LVPruning has no training here",
    "images that come on top of a cache: one prompt at a time",
)


class Qwen35(ByGrid):
    name = "qwen3_5"
    architectures = ("Qwen3_5ForConditionalGeneration",)
    text_models = ("qwen3_5_text",)
    towers = (QwenTower,)
    example = "Qwen/Qwen3.5-27B"
    limits = LIMITS

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

        def make() -> Any:
            return Qwen3_5ForConditionalGeneration(
                Qwen3_5Config(
                    vision_config=VISION, text_config=TEXT | LINEAR | ROTARY, **QWEN_TOKENS
                )
            )

        return {
            "qwen3_5": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES, linear=True)
        }


class Qwen35Moe(Qwen35):
    name = "qwen3_5_moe"
    architectures = ("Qwen3_5MoeForConditionalGeneration",)
    text_models = ("qwen3_5_moe_text",)
    example = "Qwen/Qwen3.5-35B-A3B"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

        def make() -> Any:
            return Qwen3_5MoeForConditionalGeneration(
                Qwen3_5MoeConfig(
                    vision_config=VISION,
                    text_config=TEXT | LINEAR | ROTARY | EXPERTS | SHARED,
                    **QWEN_TOKENS,
                )
            )

        return {
            "qwen3_5_moe": Tiny(
                make, grid, types=("mm_token_type_ids",), video=WITH_TIMES, linear=True
            )
        }


VISION = QWEN_VISION | {"num_position_embeddings": 64}
ROTARY = {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
