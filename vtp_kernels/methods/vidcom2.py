"""VidCom2 (arXiv 2505.14454): of a video, what is unlike the rest, and more of such frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_kernels.contract.frames import Video

from .scorers import wide
from .videos import VideoMethod

__all__ = ["VidCom2"]

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(VideoMethod, key="vidcom2"):
    """Before layer 0, of every video keep the tokens that are least like its middle and that of
    their frame, and more of them in frames that are unlike the whole.

    As the published code has it, on the rows that enter the language model: of their channels the
    half that varies least in the video, normalised; similarity of a token to a centre (the mean of
    the video's tokens, or of its frame's) is the sum of exp(-|x - c|^2 / 2a) over a = 1/8, 1/4,
    1/2, 1, 2. A frame's budget is `keep` of its tokens times 1 + p - mean(p), where p is the
    softmax over frames of -mean(similarity to the video's centre) / 0.01. In each frame those whose
    two similarities add up to least stay; equal ones by their order.

    Budgets are no whole numbers, and the published code rounds each. Here they add up to `keep`, so
    that the host knows how many stay: every frame has one token, and the others go one by one to
    the frame that lacks most of its budget, and has any left. This is ours.

    Frames that a model merges, as Qwen does two and two, are one. Pictures in the same prompt stay
    whole, and so do timestamps and rows that show nothing (`image_newline`). In a video of one
    frame both centres are the same.

    Parameters
    ----------
    keep : int | float
        Count, or share of each video's tokens; never less than one token of each frame.
    frames : "videos" | "pictures"
        "pictures": the pictures of a prompt are the frames of one video, as InternVL and SmolVLM
        get them, and must have equally many tokens.
    """

    keep: int | float = 0.25
    frames: str = "videos"

    def at_least(self, video: Video) -> int:
        return int(video.prunable.any(1).sum())

    def scores(self, features: Tensor, prunable: Tensor, count: int) -> Tensor:
        """How much of its frame's budget is left when a token's turn comes."""
        of_video, of_frame = similarities(wide(features))
        tokens = (of_video + of_frame).masked_fill(~prunable, torch.inf)
        rank = tokens.argsort(dim=1, stable=True).argsort(dim=1)
        stand_out = (-of_video.mean(1) / TEMPERATURE).softmax(0)
        budget = count / len(features) * (1 + stand_out - stand_out.mean())
        left = budget[:, None] - rank
        return left.masked_fill(rank == 0, 2 * count + 1)  # more than any budget

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """The variance of each channel, and of half of them the length of each row and its
        distances to two centres; a bound where there are pictures, too."""
        channels = config.hidden_size
        return 0 if kept == visual else 2 * visual * (channels + 3 * (channels // 2))


def similarities(features: Tensor) -> tuple[Tensor, Tensor]:
    """[T, N] each: how like the centre of the video, and that of its frame, each token is."""
    channels = features.shape[2]
    varying = features.flatten(0, 1).var(0, unbiased=False)
    steady = varying.argsort(stable=True)[: max(channels // 2, 1)].sort().values
    tokens = normalize(features[..., steady], dim=2)
    return tuple(_similarity(tokens, tokens.mean(axes, keepdim=True)) for axes in ((0, 1), 1))


def _similarity(tokens: Tensor, centre: Tensor) -> Tensor:
    distance = (tokens - centre).square().sum(2)
    return sum((-distance / (2 * width)).exp() for width in WIDTHS)
