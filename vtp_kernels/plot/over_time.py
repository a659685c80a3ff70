"""What each frame of a video kept."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from PIL import Image

from .figure import FAINT, finished, new_axes, new_figure
from .labels import at_the_end

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (640, 280)  # pixels


def over_time(
    report,
    path: str | os.PathLike | None = None,
    *,
    sample: int = 0,
    video: int = 0,
) -> Image.Image:
    """Draws how many tokens of each frame of a video were kept, a line per layer at which some
    left, the later the darker.

    Args:
        report: of a call with a video.
        path: where to write the PNG; None writes nothing.
        sample: row of the batch.
        video: which of its videos, from 0.

    Raises:
        ValueError: the prompt has no such video, the family does not tell its frames, or nothing
            left.
        ImportError: matplotlib is missing.
    """
    frames = [
        unit
        for unit in report.units or ()
        if unit["prompt"] == sample and unit.get("video") == video
    ]
    if not frames or not report.kept:
        raise ValueError(
            f"report: no frames of a video {video} in prompt {sample} that tokens left, as far as "
            "it tells"
        )
    return finished(_figure(frames), path)


def _figure(frames: list[dict[str, Any]]) -> Figure:
    figure = new_figure(*SIZE)
    axes = new_axes(figure, 52, 38, 80, 14)
    edges = [unit["frames"][0] + 1 for unit in frames] + [frames[-1]["frames"][-1] + 2]
    layers = sorted(frames[0]["kept"])
    ends = []
    for rank, layer in enumerate(layers):
        shares = [100 * unit["kept"][layer] / unit["tokens"] for unit in frames]
        shade = str(0.65 * (1 - (rank + 1) / len(layers)))
        axes.stairs(shares, [edge - 0.5 for edge in edges], baseline=None, color=shade, lw=1.8)
        ends.append((f"layer {layer}", shares[-1], shade))
    axes.set_xlim(edges[0] - 0.5, edges[-1] - 0.5)
    axes.set_ylim(0, 103)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_xlabel("frame", fontsize=9)
    axes.set_ylabel("tokens kept, %", fontsize=9)
    at_the_end(axes, ends)
    return figure
