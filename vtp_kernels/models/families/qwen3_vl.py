"""Qwen3-VL, dense and with experts: as Qwen2.5-VL, with more features of the vision tower after
each of its first layers, and a timestamp before each frame of a video."""

from __future__ import annotations

from typing import Any

from ..towers import QwenTower
from .deepstack import Planes
from .qwen2_vl import AUDIO_TOKENS, QWEN_TOKENS, QWEN_VISION, ROPE, ByGrid, grid, timed, video
from .tiny import EXPERTS, TEXT, Tiny, TinyVideo

__all__ = ["Qwen3OmniMoe", "Qwen3VL", "Qwen3VLMoe", "take_deepstack"]


class Qwen3VL(ByGrid):
    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)
    example = "Qwen/Qwen3-VL-8B-Instruct"
    text_models = ("qwen3_vl_text",)
    towers = (QwenTower,)

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        return take_deepstack(arguments, first)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        def make() -> Any:
            return Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(
                    vision_config=DEEPSTACK_VISION,
                    text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen3_vl": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"
    architectures = ("Qwen3VLMoeForConditionalGeneration",)
    example = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    text_models = ("qwen3_vl_moe_text",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        def make() -> Any:
            return Qwen3VLMoeForConditionalGeneration(
                Qwen3VLMoeConfig(
                    vision_config=DEEPSTACK_VISION,
                    text_config=TEXT | EXPERTS | {"head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen3_vl_moe": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}


class Qwen3OmniMoe(Qwen3VL):
    """The part of Qwen3-Omni that reads and answers."""

    name = "qwen3_omni_moe_thinker"
    architectures = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
    example = "Qwen/Qwen3-Omni-30B-A3B-Instruct"
    since = "5.23"
    text_models = ("qwen3_omni_moe_text",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Qwen3OmniMoeThinkerConfig,
            Qwen3OmniMoeThinkerForConditionalGeneration,
        )

        audio = {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        }

        def make() -> Any:
            return Qwen3OmniMoeThinkerForConditionalGeneration(
                Qwen3OmniMoeThinkerConfig(
                    vision_config=DEEPSTACK_VISION,
                    audio_config=audio,
                    text_config=TEXT
                    | EXPERTS
                    | {"vocab_size": 104, "head_dim": 16, "rope_parameters": ROPE},
                    **QWEN_TOKENS,
                    **AUDIO_TOKENS,
                )
            )

        around = TinyVideo(timed, around=(96, 97))
        return {"qwen3_omni_moe_thinker": Tiny(make, grid, video=around)}


def take_deepstack(arguments: dict[str, Any], first: int) -> Planes | None:
    """What is added after the first layers, one by one."""
    features = arguments.get("deepstack_visual_embeds")
    if features is None or first >= len(features):
        return None
    arguments["deepstack_visual_embeds"] = None
    return Planes(arguments["visual_pos_masks"], dict(enumerate(features, start=1)))


# Before each grid of frames its time in words, and where vision starts; behind it where it ends.
WITH_TIMES = TinyVideo(video, before=(60, 61, 62, 96), after=(97,))
DEEPSTACK_VISION = QWEN_VISION | {
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
