"""How often the answer is right against what is saved: a point a method."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from .figure import COLORS, FAINT, GREY, MARKERS, finished, new_axes, new_figure
from .labels import beside_points
from .names import DENSE, kind_of, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 860  # pixels
HEIGHTS = (440, 560, 720, 900, 1200)  # the first in which all names have room


def tradeoff(
    points: Mapping[str, tuple[float, float] | Sequence[tuple[float, float]]],
    path: str | os.PathLike | None = None,
    *,
    saved: str = "prefill FLOPs saved",
    right: str = "right answers",
) -> Image.Image:
    """Draws methods by what they save and by how often the answer is still right.

    Every point has its name beside it; of several points of one method, which a line joins, the
    last. Methods of one kind have one color and one mark.

    Args:
        points: method -> (share saved, share of right answers), both from 0 to 1, or several such
            pairs in the order of the line. A method is named as on the command line, which is put
            into words, or in words.
        path: where to write the PNG; None writes nothing.
        saved, right: what the shares are of, for the axes.

    Raises:
        ValueError: there are no points, some are no shares, or there are too many for all of them
            to be named.
        ImportError: matplotlib is missing.
    """
    if not points:
        raise ValueError("points: expected at least one method, got none")
    lines = {name: _line(name, given) for name, given in points.items()}
    for over_lines, height in itertools.product((False, True), HEIGHTS):
        figure = _figure(lines, height, saved, right, over_lines)
        if figure is not None:
            return finished(figure, path)
    raise ValueError(f"points: {len(points)} are too many for their names; draw fewer at once")


def _line(name: str, given: Sequence) -> list[tuple[float, float]]:
    """The points of one method."""
    pairs = [given] if len(given) and not isinstance(given[0], Sequence) else list(given)
    for pair in pairs or [()]:
        if len(pair) != 2 or not all(0 <= share <= 1 for share in pair):
            raise ValueError(f"points: expected two shares from 0 to 1, got {pair} for {name!r}")
    return pairs


def _figure(
    lines: Mapping[str, list[tuple[float, float]]],
    height: int,
    saved: str,
    right: str,
    over_lines: bool,
) -> Figure | None:
    """None if the names have no room in it; over the lines of methods, if they may."""
    figure = new_figure(WIDTH, height)
    axes = new_axes(figure, 56, 44, 90, 24)
    lowest = min(share for line in lines.values() for _, share in line)
    axes.set_xlim(_from(100 * min(share for line in lines.values() for share, _ in line)), 100)
    axes.set_ylim(*_range(100 * lowest))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_xlabel(f"{saved}, %", fontsize=9)
    axes.set_ylabel(f"{right}, %", fontsize=9)
    names = readable(list(lines))
    named, others, curves = [], [], []
    for name, line, look in zip(names, lines.values(), _looks(names), strict=True):
        color, marker = look
        x, y = ([100 * pair[axis] for pair in line] for axis in (0, 1))
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.6)
        axes.plot(x, y, marker, color=color, markersize=7, mec="white", mew=0.7, clip_on=False)
        others += zip(x[:-1], y[:-1], strict=True)
        curves.append([] if over_lines else list(zip(x, y, strict=True)))
        named.append((name, x[-1], y[-1], color))
    return None if beside_points(axes, named, others, curves) is None else figure


def _from(least: float) -> float:
    """Just below 0, or a round number below the least where all save much."""
    return -3 if least < 50 else 10 * math.floor(least / 10) - 1


def _range(lowest: float) -> tuple[float, float]:
    """From a round number below the lowest to just above 100 per cent."""
    step = 10 if lowest < 85 else 2
    floor = max(step * math.floor(lowest / step) - step / 2, -2)
    return floor, 100 + (100 - floor) / 40


def _looks(names: list[str]) -> list[tuple[str, str]]:
    """Color and mark of each, by its kind."""
    kinds = [kind_of(name) for name in names]
    plain = {DENSE: (GREY, "o"), "chance": (GREY, "X")}
    others = [kind for kind in dict.fromkeys(kinds) if kind not in plain]
    styles = {
        kind: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(others)
    }
    return [(plain | styles)[kind] for kind in kinds]
