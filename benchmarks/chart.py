"""A picture of a benchmark's ratios: one line an op, one dot a shape, beside its best rival."""

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.harness import Timing
from vtp_kernels.plot.figure import (
    COLORS,
    FAINT,
    INK,
    check_matplotlib,
    finished,
    new_axes,
    new_figure,
)

__all__ = ["check_matplotlib", "draw"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, LINE = 860, 30  # pixels
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
FASTER, SLOWER = COLORS[0], COLORS[1]


def draw(timings: list[Timing], path: str | os.PathLike | None = None) -> Image.Image:
    """How many times faster than the best rival, on a logarithmic scale; slower as a cross."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    by_op: dict[str, list[float]] = {}
    for timing in timings:
        by_op.setdefault(timing.op, []).append(min(timing.speedup.values()))
    return finished(_figure(by_op), path)


def _figure(by_op: dict[str, list[float]]) -> "Figure":
    figure = new_figure(WIDTH, LINE * len(by_op) + 84)
    axes = new_axes(figure, 150, 40, 20, 34)
    low = min(0.5, *map(min, by_op.values()))
    high = max(2.0, *map(max, by_op.values()))
    axes.set_xscale("log")
    axes.set_xlim(0.9 * low, 1.25 * high)
    axes.set_ylim(len(by_op) - 0.5, -0.5)
    ticks = [tick for tick in TICKS if 0.9 * low <= tick <= 1.25 * high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(by_op)), list(by_op), fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.axvline(1, color=INK, linewidth=1.2)
    for line, ratios in enumerate(by_op.values()):
        faster = [ratio for ratio in ratios if ratio >= 1]
        slower = [ratio for ratio in ratios if ratio < 1]
        axes.plot(faster, [line] * len(faster), "o", color=FASTER, alpha=0.55, ms=6, mew=0)
        axes.plot(slower, [line] * len(slower), "x", color=SLOWER, ms=6, mew=1.8)
        mean = statistics.geometric_mean(ratios)
        axes.plot([mean, mean], [line - 0.34, line + 0.34], color=INK, linewidth=2.5)
    axes.set_title(
        "times faster than the best rival: a dot a shape, a cross where slower, a bar their mean",
        fontsize=9,
        loc="left",
        color=INK,
    )
    return figure
