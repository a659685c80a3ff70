"""Pictures, and frames of videos, as a method may ask for them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Unit", "Units"]


class Unit(NamedTuple):
    """A picture, or a frame of a video, of a prompt; frames that the model merges are one.

    picture, video : which picture or video of its prompt, from 0; the other is None.
    frames : which frames of the video, from 0.
    columns : int64 [N], on the CPU: the input columns of its visual tokens, those too that show
        nothing, as `image_newline`, which belong to what is before them.
    grid : of a frame, int64 [H, W], on the CPU: the column of the token that shows each of its
        cells. None of a picture, which may be shown in crops, and of a frame that is.
    """

    prompt: int
    picture: int | None
    video: int | None
    frames: range | None
    columns: Tensor
    grid: Tensor | None = None


class Units(Protocol):
    """Those of a call, found out when somebody asks."""

    @property
    def all(self) -> list[list[Unit]]:
        """Of each prompt, in the order in which they stand in it."""

    @property
    def videos(self) -> bool:
        """Whether there are videos."""

    @property
    def between_frames(self) -> Tensor:
        """bool [B, S], on the CPU: columns between the frames of videos that show none."""

    def numbers(self, device: torch.device) -> Tensor:
        """int64 [B, S]: of each column the number of its unit; -1 for none."""

    def visual_rows(self, visual: Tensor) -> Tensor:
        """`visual` bool [B, S], the prompts' own, on the CPU."""

    def counts(self, visual: Tensor) -> list[list[int]]:
        """Of each unit, how many columns of `visual` bool [B, S] it has."""
