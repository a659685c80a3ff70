"""FrameDifference: of a video, the tokens that are not as in the frame before (EVS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.contract.frames import Video

from .scorers import wide
from .videos import VideoMethod

__all__ = ["FrameDifference"]

FIRST_FRAME = 4.0
"""Its score, above all others: these are 2 at most."""


@dataclass(frozen=True)
class FrameDifference(VideoMethod, key="framedifference"):
    """Before layer 0, of every video keep the first frame, and what differs most from frame to
    frame: efficient video sampling (EVS) as vLLM, SGLang and TensorRT-LLM have it.

    A token scores 1 - cosine to the token of the same place in the frame before, of the rows that
    enter the language model. (The paper, arXiv 2510.14624, compares pixels instead.) The highest
    scores of the whole video stay; equal ones by their order. Frames that a model merges, as Qwen
    does two and two, are one. Pictures in the same prompt stay whole, and so do timestamps and rows
    that show nothing (`image_newline`). A video of one frame is refused; the one picture of a
    prompt, with frames="pictures", stays whole. Scores are float32, whatever the model computes in;
    this is ours.

    Parameters
    ----------
    keep : int | float
        Count, or share of each video's tokens (rounded, halves up; those engines round down); never
        less than a frame's.
    frames : "videos" | "pictures"
        "pictures": the pictures of a prompt are the frames of one video, as InternVL and SmolVLM
        get them, and must have equally many tokens.
    """

    keep: int | float = 0.25
    frames: str = "videos"

    def at_least(self, video: Video) -> int:
        return int(video.prunable[0].sum())

    def scores(self, features: Tensor, prunable: Tensor, count: int) -> Tensor:
        rows = wide(features)
        largest = rows.abs().amax(2, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1)  # their squares are within range
        squares = rows.square().sum(2)
        product = (rows[1:] * rows[:-1]).sum(2)
        # This way the cosine of rows that are the same is 1 exactly.
        length = (squares[1:] * squares[:-1]).sqrt()
        cosine = torch.where(length > 0, product / length, length)
        return pad(1 - cosine, (0, 0, 1, 0), value=FIRST_FRAME)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """A square and a product of each row; a bound where there are pictures, too."""
        return 0 if kept == visual else 4 * visual * config.hidden_size
