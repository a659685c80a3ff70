"""Qwen2-VL, Qwen2.5-VL, and the thinker of Qwen2.5-Omni: pictures and videos keep their shape, and
a token shows a square of patches."""

from __future__ import annotations

from typing import Any

import torch

from ..towers import QwenTower
from .family import Family
from .looks import Given, Looks, whole
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo

__all__ = [
    "AUDIO_TOKENS",
    "QWEN_TOKENS",
    "QWEN_VISION",
    "ROPE",
    "ByGrid",
    "Qwen2VL",
    "Qwen25Omni",
    "Qwen25VL",
    "flat_grid",
    "flat_video",
    "grid",
    "merged",
    "merged_frames",
    "timed",
    "video",
]


class ByGrid(Family):
    """Pictures and frames come with a grid of patches each, which keeps their shape."""

    grid_positions = True

    def looks(self, given: Given) -> list[Looks]:
        return merged(given)

    def frames(self, given: Given) -> list[Looks]:
        return merged_frames(given)


class Qwen2VL(ByGrid):
    name = "qwen2_vl"
    architectures = ("Qwen2VLForConditionalGeneration",)
    example = "Qwen/Qwen2-VL-7B-Instruct"
    text_models = ("qwen2_vl_text",)
    towers = (QwenTower,)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        def make() -> Any:
            return Qwen2VLForConditionalGeneration(
                Qwen2VLConfig(
                    vision_config={
                        "depth": 2,
                        "embed_dim": 32,
                        "hidden_size": 64,
                        "num_heads": 4,
                        "patch_size": 4,
                        "mlp_ratio": 2,
                    },
                    text_config=TEXT | {"rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {"qwen2_vl": Tiny(make, grid, types=("mm_token_type_ids",), video=TinyVideo(video))}


class Qwen25VL(ByGrid):
    name = "qwen2_5_vl"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    text_models = ("qwen2_5_vl_text",)
    towers = (QwenTower,)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        def make() -> Any:
            return Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    vision_config=QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
                    text_config=TEXT | {"rope_parameters": ROPE},
                    **QWEN_TOKENS,
                )
            )

        return {
            "qwen2_5_vl": Tiny(make, grid, types=("mm_token_type_ids",), video=TinyVideo(video))
        }


class Qwen25Omni(ByGrid):
    """The part that reads and answers; it is a model of its own in transformers."""

    name = "qwen2_5_omni_thinker"
    architectures = ("Qwen2_5OmniThinkerForConditionalGeneration",)
    example = "Qwen/Qwen2.5-Omni-7B"
    since = "5.23"
    text_models = ("qwen2_5_omni_text",)
    towers = (QwenTower,)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            Qwen2_5OmniThinkerConfig,
            Qwen2_5OmniThinkerForConditionalGeneration,
        )

        def make() -> Any:
            return Qwen2_5OmniThinkerForConditionalGeneration(
                Qwen2_5OmniThinkerConfig(
                    vision_config=QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
                    audio_config={
                        "d_model": 32,
                        "encoder_layers": 1,
                        "encoder_attention_heads": 2,
                        "encoder_ffn_dim": 32,
                        "output_dim": 64,
                    },
                    text_config=TEXT | {"vocab_size": 104, "rope_parameters": ROPE},
                    image_token_index=IMAGE,
                    video_token_index=VIDEO,
                    audio_token_index=AUDIO_TOKENS["audio_token_id"],
                    vision_start_token_id=96,
                    vision_end_token_id=97,
                    audio_start_token_id=AUDIO_TOKENS["audio_start_token_id"],
                    audio_end_token_id=AUDIO_TOKENS["audio_end_token_id"],
                )
            )

        return {"qwen2_5_omni_thinker": Tiny(make, grid, video=TinyVideo(timed, around=(96, 97)))}


def merged(given: Given) -> list[Looks]:
    """Pictures that keep their shape, with a square of patches to each token."""
    looks = []
    for time, height, width in given.grid("image_grid_thw"):
        if time != 1:
            raise NotImplementedError(f"image_grid_thw: {time} frames in one picture are not drawn")
        looks.append(_square_patches(given, height, width))
    return looks


def merged_frames(given: Given, merge: int = 1) -> list[Looks]:
    """The same of videos: a patch may be of some frames that follow upon each other, two of them in
    Qwen's models. `merge`: how many such grids a token shows."""
    together = merge * getattr(given.base.config.vision_config, "temporal_patch_size", 1)
    return [
        _square_patches(given, height, width)._replace(
            video=video, frames=range(t * together, (t + 1) * together)
        )
        for video, (time, height, width) in enumerate(given.grid("video_grid_thw"))
        for t in range(time // merge)
    ]


def _square_patches(given: Given, height: int, width: int) -> Looks:
    merge = given.base.config.vision_config.spatial_merge_size
    return whole(height // merge, width // merge)


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 64,
}
# Words of prompts, which are random, must not be among them: so they are behind all others.
AUDIO_TOKENS = {"audio_token_id": 100, "audio_start_token_id": 101, "audio_end_token_id": 102}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 96,
    "vision_end_token_id": 97,
}


def grid(generator: torch.Generator, index: int, numbers: int = 96) -> dict[str, Any]:
    """Patches of a Qwen picture, of so many numbers: 16, 12 or 6 tokens of 2 x 2 patches each."""
    height, width = ((8, 8), (4, 12), (6, 4))[index]
    return {
        "pixel_values": torch.randn(height * width, numbers, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def flat_grid(generator: torch.Generator, index: int) -> dict[str, Any]:
    """The same where a patch is of one frame."""
    return grid(generator, index, numbers=48)


def video(generator: torch.Generator, index: int, numbers: int = 96) -> dict[str, Any]:
    """Videos of 2, 4 or 64 grids of 8 or 4 tokens, each of two frames."""
    time, height, width = ((2, 4, 8), (4, 4, 4), (64, 4, 4))[index]
    return {
        "pixel_values_videos": torch.randn(time * height * width, numbers, generator=generator),
        "video_grid_thw": torch.tensor([[time, height, width]]),
    }


def flat_video(generator: torch.Generator, index: int) -> dict[str, Any]:
    """The same where a patch is of one frame."""
    return video(generator, index, numbers=48)


def timed(generator: torch.Generator, index: int) -> dict[str, Any]:
    """With the seconds that a grid lasts."""
    return video(generator, index) | {"video_second_per_grid": torch.ones(1)}
