"""Methods for videos: what a frame shows anew stays."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.frames import Video, videos_of
from vtp_kernels.contract.method import Method

from .budget import check_keep, visual_budget

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows
    from vtp_kernels.contract.unit import Unit

__all__ = ["FRAMES", "VideoMethod"]

FRAMES = ("videos", "pictures")
"""What comes as frames: those of videos; or the pictures of a prompt, too, as its one video."""


class VideoMethod(Method):
    """Before layer 0, `keep` of the tokens of every video stay.

    Subclasses have the fields `keep` and `frames`, and say how many stay at least, and which.
    """

    keep: int | float
    frames: str

    @abstractmethod
    def at_least(self, video: Video) -> int:
        """Tokens that every video keeps."""

    @abstractmethod
    def scores(self, features: Tensor, prunable: Tensor, count: int) -> Tensor:
        """float [T, N]: by which `count` of the tokens of a video stay, the highest. `features`
        float [T, N, C]; `prunable` bool [T, N]: False of those that stay anyway and do not
        count."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_keep(self.keep, f"{owner}.keep")
        if self.frames not in FRAMES:
            raise ValueError(
                f"{owner}.frames: got {shown(self.frames)}, expected one of {list(FRAMES)}"
            )

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def needs_units(self) -> bool:
        return True

    @property
    def _pictures(self) -> bool:
        return self.frames == "pictures"

    def check_units(self, units: list[list[Unit]]) -> None:
        name = type(self).__name__
        videos_of(units, self._pictures, f"{name}.frames")
        for prompt, of_prompt in enumerate(units):
            frames = Counter(unit.video for unit in of_prompt if unit.video is not None)
            for video, count in frames.items():
                if count < 2:
                    raise ValueError(
                        f"{name}: expected videos of two frames or more, got one frame in video "
                        f"{video} of prompt {prompt}; frames that the model merges, as Qwen does "
                        "two and two, are one"
                    )

    def check_config(self, family: str, config: Any) -> None:
        from vtp_kernels.models.families import FAMILIES

        if not self._pictures and not FAMILIES[family].tells_frames:
            raise ValueError(
                f"{type(self).__name__}.frames: it is not known of {family} which tokens show "
                "which frame of a video; where it is given frames as pictures, frames='pictures' "
                "takes those of a prompt for one video"
            )

    def budget(self, video: Video) -> int:
        """How many tokens of a video stay."""
        least = max(visual_budget(self.keep, video.tokens), self.at_least(video))
        return min(least, video.tokens)

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        videos = rows.videos(self._pictures)
        counts = [self.budget(video) for video in videos]
        if all(count == video.tokens for count, video in zip(counts, videos, strict=True)):
            return None
        scores = [
            self.scores(rows.tokens_of(video), rows.moved(video.prunable), count)
            for video, count in zip(videos, counts, strict=True)
        ]
        return rows.keep_of_videos(videos, counts, scores)
