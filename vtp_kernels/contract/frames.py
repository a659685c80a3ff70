"""Videos, frame by frame, as a method may ask for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .unit import Unit

__all__ = ["Video", "videos_of"]


class Video(NamedTuple):
    """A video of a prompt: T frames of N tokens each, which show the same N cells.

    columns : int64 [T, N], on the CPU: the input column of the token of each cell.
    prunable : bool [T, N], on the CPU: False of a token whose logits are asked for.
    """

    prompt: int
    columns: Tensor
    prunable: Tensor

    @property
    def tokens(self) -> int:
        """How many of them may leave."""
        return int(self.prunable.sum())


def videos_of(units: list[list[Unit]], pictures: bool, where: str) -> list[list[Tensor]]:
    """Of the videos of each prompt, in order, the columns int64 [T, N] of their cells.

    pictures: whether the pictures of a prompt are the frames of a video, too. Raises ValueError
    naming `where` for frames of a video that have unlike numbers of tokens.
    """
    found = []
    for prompt, of_prompt in enumerate(units):
        frames: dict[int | None, list[Tensor]] = {}
        for unit in of_prompt:
            if unit.video is not None:
                shown = unit.columns if unit.grid is None else unit.grid.flatten()
                frames.setdefault(unit.video, []).append(shown)
            elif pictures:
                frames.setdefault(None, []).append(unit.columns)
        for video, columns in frames.items():
            numbers = sorted({len(some) for some in columns})
            if len(numbers) > 1:
                what = "pictures" if video is None else f"frames of video {video}"
                raise ValueError(
                    f"{where}, prompt {prompt}: the {what} have {numbers} tokens, and frames of a "
                    "video must have equally many"
                )
        found.append([torch.stack(columns) for columns in frames.values()])
    return found
