"""DeepSeek-VL, with one vision tower or two, and Janus: every picture as one square."""

from __future__ import annotations

from typing import Any

import torch

from ..towers import AlignedTower
from .family import Family
from .looks import Given, Looks
from .squares import padded, squares
from .tiny import IMAGE, SQUARE, TEXT, VISION, Tiny, siglip, square

__all__ = ["DeepseekVL", "DeepseekVLHybrid", "Janus"]


class DeepseekVL(Family):
    name = "deepseek_vl"
    architectures = ("DeepseekVLForConditionalGeneration",)
    example = "deepseek-community/deepseek-vl-1.3b-chat"
    text_models = ("llama",)
    towers = (AlignedTower,)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given, padded)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            DeepseekVLConfig,
            DeepseekVLForConditionalGeneration,
            LlamaConfig,
        )

        def make() -> Any:
            return DeepseekVLForConditionalGeneration(
                DeepseekVLConfig(
                    vision_config=siglip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                )
            )

        return {"deepseek_vl": Tiny(make, square(56))}


class DeepseekVLHybrid(DeepseekVL):
    """A second tower sees the picture larger, and is scaled down to the patches of the first, each
    of which is a visual token: what counts is what the first saw."""

    name = "deepseek_vl_hybrid"
    architectures = ("DeepseekVLHybridForConditionalGeneration",)
    example = "deepseek-community/deepseek-vl-7b-chat"
    limits = ("InflectionPruning: by the tower whose patches are tokens, not by the larger one",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            DeepseekVLHybridConfig,
            DeepseekVLHybridForConditionalGeneration,
            LlamaConfig,
            SamVisionConfig,
        )

        def make() -> Any:
            return DeepseekVLHybridForConditionalGeneration(
                DeepseekVLHybridConfig(
                    vision_config=siglip(),
                    high_res_vision_config=SamVisionConfig(
                        hidden_size=32,
                        output_channels=32,
                        num_hidden_layers=2,
                        num_attention_heads=4,
                        image_size=128,
                        patch_size=8,
                        window_size=4,
                        global_attn_indexes=[1],
                        mlp_dim=64,
                    ),
                    text_config=LlamaConfig(**TEXT),
                    image_token_id=IMAGE,
                )
            )

        def twice(generator: torch.Generator, index: int) -> dict[str, Any]:
            large = torch.randn(1, 3, 128, 128, generator=generator)
            return square(56)(generator, index) | {"high_res_pixel_values": large}

        return {"deepseek_vl_hybrid": Tiny(make, twice)}


class Janus(DeepseekVL):
    """What it reads; the pictures that it makes come of a way of its own."""

    name = "janus"
    architectures = ("JanusForConditionalGeneration",)
    example = "deepseek-community/Janus-Pro-7B"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

        def make() -> Any:
            return JanusForConditionalGeneration(
                JanusConfig(
                    vision_config=VISION
                    | SQUARE
                    | {
                        "projection_dim": 64,
                        "depth": 2,
                        "mlp_ratio": 2.0,
                        "num_image_tokens": 16,
                    },
                    text_config=LlamaConfig(**TEXT),
                    vq_config={
                        "embed_dim": 8,
                        "num_embeddings": 16,
                        "latent_channels": 32,
                        "base_channels": 32,
                        "channel_multiplier": [1, 1],
                        "num_res_blocks": 1,
                    },
                    image_token_id=IMAGE,
                )
            )

        return {"janus": Tiny(make, square(56))}
