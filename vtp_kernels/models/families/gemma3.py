"""Gemma 3: the tokens of a picture see each other, in layers with a sliding window and without."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..keys.masks import tells_by_mask
from ..keys.reach import Blocks
from ..towers import PooledTower
from .family import Family
from .looks import Given, Looks
from .squares import squares
from .tiny import IMAGE, TEXT, Tiny, siglip, square

__all__ = ["Gemma3"]


class Gemma3(Family):
    name = "gemma3"
    architectures = ("Gemma3ForConditionalGeneration",)
    text_models = ("gemma3_text",)
    towers = (PooledTower,)
    example = "google/gemma-3-4b-it"
    sees_ahead = True
    limits = (
        "VisiPruner: no layers with passive visual tokens",
        "a StaticCache must be shorter than the sliding window",
    )

    def blocks(self, base: nn.Module, arguments: dict[str, Any]) -> Blocks | None:
        types = arguments.get("token_type_ids")
        if types is None or not tells_by_mask(base.language_model.config):
            return None  # as in FlashAttention, which sees what is before
        rule = sys.modules[type(base).__module__].get_block_sequence_ids_for_mask
        return Blocks(rule(types), in_window=True)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

        def make() -> Any:
            text = Gemma3TextConfig(
                **TEXT,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 3,
            )
            return Gemma3ForConditionalGeneration(
                Gemma3Config(
                    vision_config=siglip(),
                    text_config=text,
                    image_token_index=IMAGE,
                    mm_tokens_per_image=16,
                )
            )

        return {"gemma3": Tiny(make, square(56), types=("token_type_ids",))}
