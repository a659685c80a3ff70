"""PaliGemma: all rows of a prompt, picture and words, see each other; those of an answer do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..keys.masks import tells_by_mask
from ..keys.reach import Blocks
from ..towers import WholeTower
from .family import Family
from .looks import Given, Looks
from .squares import squares
from .tiny import IMAGE, TEXT, Tiny, siglip, square

__all__ = ["PaliGemma"]


class PaliGemma(Family):
    name = "paligemma"
    architectures = ("PaliGemmaForConditionalGeneration",)
    text_models = ("gemma",)
    towers = (WholeTower,)
    example = "google/paligemma-3b-mix-224"
    sees_ahead = True
    may_be_acausal = True
    limits = (
        "VisiPruner: no layers with passive visual tokens",
        "PaliGemma 2: its gemma2 text model caps the logits of its attention",
    )

    def blocks(self, base: nn.Module, arguments: dict[str, Any]) -> Blocks | None:
        types, cache = arguments.get("token_type_ids"), arguments.get("past_key_values")
        if cache is not None and cache.is_initialized and arguments.get("pixel_values") is None:
            return None  # as the model has it: only the first of all calls begins with a prefix
        kind = base.language_model.config._attn_implementation
        if not tells_by_mask(base.language_model.config):
            raise NotImplementedError(
                f"the attention implementation {kind!r} takes no masks but of padding, and it is a "
                "mask that tells which rows of PaliGemma see each other; use 'sdpa'"
            )
        if types is None:
            raise ValueError(
                "token_type_ids: needed to tell the prompt, whose rows see each other, from what "
                "follows it; pass on what the processor gives"
            )
        return Blocks(torch.where(types == 0, 0, -1), in_window=False)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            GemmaConfig,
            PaliGemmaConfig,
            PaliGemmaForConditionalGeneration,
        )

        def make() -> Any:
            return PaliGemmaForConditionalGeneration(
                PaliGemmaConfig(
                    vision_config=siglip(),
                    text_config=GemmaConfig(**TEXT, head_dim=16),
                    image_token_index=IMAGE,
                    projection_dim=64,
                )
            )

        return {"paligemma": Tiny(make, square(56), types=("token_type_ids",), type_of_picture=0)}
