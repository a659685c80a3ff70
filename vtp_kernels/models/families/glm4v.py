"""GLM-4.1V, GLM-4.5V (with experts), GLM-4.6V and GLM-OCR: as Qwen2-VL, with another tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..towers import QwenTower
from .qwen2_vl import ROPE, ByGrid, grid, video
from .tiny import EXPERTS, IMAGE, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["Glm4v", "Glm4vMoe", "Glm46v", "GlmOcr"]

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "image_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
}
# Each grid of frames as a picture, and behind it its time in words.
WITH_TIMES = TinyVideo(video, before=(96,), after=(97, 60, 61), around=(94, 95), token=IMAGE)
GLM_TEXT = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 96,
    "image_end_token_id": 97,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}


class Glm4v(ByGrid):
    name = "glm4v"
    architectures = ("Glm4vForConditionalGeneration",)
    example = "zai-org/GLM-4.1V-9B-Thinking"
    text_models = ("glm4v_text",)
    towers = (QwenTower,)
    limits = (
        "videos: one answer to a prompt, without beams; transformers loses them where it repeats "
        "prompts",
    )

    def placeholders(self, base: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Frames of videos have the token of pictures, between tokens that begin and end a video.
        Transformers gives all that have it to what is there, so that only one kind can be."""
        found = super().placeholders(base, arguments)
        _check_repeated(arguments)
        if "video" in found and arguments.get("input_ids") is not None:
            if "image" in found:
                raise NotImplementedError(
                    "pixel_values, pixel_values_videos: GLM has one token for pictures and frames "
                    "of videos, and transformers cannot tell which of them is which; give the "
                    "model pictures or videos"
                )
            (picture,) = (modality for modality in self.modalities if modality.name == "image")
            found["video"] = picture.rows(base, arguments)
        return found

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Glm4vConfig, Glm4vForConditionalGeneration

        def make() -> Any:
            return Glm4vForConditionalGeneration(
                Glm4vConfig(vision_config=VISION, text_config=GLM_TEXT, **TOKENS)
            )

        return {"glm4v": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}


def _check_repeated(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError where generate() has lost the videos that it encoded."""
    encoded = (arguments.get("mm_encoder_outputs") or {}).get("video")
    features = getattr(encoded, "pooler_output", None)
    if features is not None and not len(features):
        raise NotImplementedError(
            "num_beams, num_return_sequences: transformers loses GLM's videos when it repeats "
            "prompts, for it looks for a token that their frames do not have; generate one answer "
            "to a prompt, without beams"
        )


class Glm4vMoe(Glm4v):
    name = "glm4v_moe"
    architectures = ("Glm4vMoeForConditionalGeneration",)
    example = "zai-org/GLM-4.5V"
    text_models = ("glm4v_moe_text",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

        experts = EXPERTS | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }

        def make() -> Any:
            return Glm4vMoeForConditionalGeneration(
                Glm4vMoeConfig(vision_config=VISION, text_config=GLM_TEXT | experts, **TOKENS)
            )

        return {"glm4v_moe": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}


class GlmOcr(Glm4v):
    name = "glm_ocr"
    architectures = ("GlmOcrForConditionalGeneration",)
    example = "zai-org/GLM-OCR"
    text_models = ("glm_ocr_text",)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

        def make() -> Any:
            return GlmOcrForConditionalGeneration(
                GlmOcrConfig(vision_config=VISION, text_config=GLM_TEXT, **TOKENS)
            )

        return {"glm_ocr": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}


class Glm46v(Glm4v):
    name = "glm46v"
    architectures = ("Glm46VForConditionalGeneration",)
    example = "zai-org/GLM-4.6V-Flash"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import Glm4vConfig, Glm46VConfig, Glm46VForConditionalGeneration

        def make() -> Any:
            parts = Glm4vConfig(vision_config=VISION, text_config=GLM_TEXT)
            return Glm46VForConditionalGeneration(
                Glm46VConfig(
                    vision_config=parts.vision_config, text_config=parts.text_config, **TOKENS
                )
            )

        return {"glm46v": Tiny(make, grid, types=("mm_token_type_ids",), video=WITH_TIMES)}
