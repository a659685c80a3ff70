"""DeepSeek-VL and Janus: every picture as one square."""

from __future__ import annotations

from typing import Any

from ..looks import Given, Looks
from .family import Family
from .squares import squares
from .tiny import IMAGE, TEXT, Tiny, siglip, square

__all__ = ["DeepseekVL", "Janus"]


class DeepseekVL(Family):
    name = "deepseek_vl"
    architectures = ("DeepseekVLForConditionalGeneration",)
    text_models = ("llama",)

    def looks(self, given: Given) -> list[Looks]:
        return squares(given)

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


class Janus(DeepseekVL):
    """What it reads; the pictures that it makes come of a way of its own."""

    name = "janus"
    architectures = ("JanusForConditionalGeneration",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

        def make() -> Any:
            return JanusForConditionalGeneration(
                JanusConfig(
                    vision_config={
                        "hidden_size": 32,
                        "intermediate_size": 64,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "image_size": 56,
                        "patch_size": 14,
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
