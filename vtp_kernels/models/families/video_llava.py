"""Video-LLaVA: pictures as LLaVA-1.5, and videos of eight frames each of which has a CLS token."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..towers import VideoLlavaTower
from .family import Family, Modality
from .looks import Given, Looks
from .pooled import pooled_frames
from .squares import cropped_squares, shown_by
from .tiny import IMAGE, TEXT, VIDEO, Tiny, TinyVideo, clip, frames, square

__all__ = ["VideoLlava"]


class VideoLlava(Family):
    name = "video_llava"
    architectures = ("VideoLlavaForConditionalGeneration",)
    example = "LanguageBind/Video-LLaVA-7B-hf"
    since = "5.23"
    text_models = ("llama",)
    towers = (VideoLlavaTower,)
    modalities = (
        Modality("image", "pixel_values", "pixel_values_images"),  # the name it had up to 5.22
        Modality("video", "pixel_values_videos"),
    )

    def looks(self, given: Given) -> list[Looks]:
        return cropped_squares(given)

    def frames(self, given: Given) -> list[Looks]:
        return pooled_frames(given, given.side, partial(shown_by, given.video_processor), first=1)

    def tiny(self) -> dict[str, Tiny]:
        from transformers import (
            LlamaConfig,
            VideoLlavaConfig,
            VideoLlavaForConditionalGeneration,
        )

        def make() -> Any:
            return VideoLlavaForConditionalGeneration(
                VideoLlavaConfig(
                    vision_config=clip(),
                    text_config=LlamaConfig(**TEXT),
                    image_token_index=IMAGE,
                    video_token_index=VIDEO,
                    image_seq_length=16,
                )
            )

        return {"video_llava": Tiny(make, square(56), video=TinyVideo(frames))}
