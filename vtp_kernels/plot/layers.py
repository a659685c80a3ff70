"""How many visual tokens are left, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from .figure import COLORS, FAINT, GREY, finished, new_axes, new_figure, width_of
from .labels import LABEL, at_the_end
from .names import DENSE, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (760, 380)  # pixels
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def layers(
    report: Any | Mapping[str, Any],
    path: str | os.PathLike | None = None,
    *,
    sample: int = 0,
) -> Image.Image:
    """Draws how many visual tokens enter each layer, and beside it how many do without pruning.

    Args:
        report: a report; or {name: report} for several methods on the same prompt, each with a
            line of its own. In place of a report may stand the counts themselves, one a layer.
        path: where to write the PNG; None writes nothing.
        sample: row of the batch.

    Raises:
        ValueError: there is nothing to draw, `sample` is not in the batch, or the reports are of
            models of different depth.
        ImportError: matplotlib is missing.
    """
    reports = report if isinstance(report, Mapping) else {"": report}
    if not reports:
        raise ValueError("report: expected at least one, got none")
    counts = {name: _counts(one, sample) for name, one in reports.items()}
    depths = {name: len(of_layers) for name, (_, of_layers) in counts.items()}
    if len(set(depths.values())) != 1 or 0 in depths.values():
        raise ValueError(f"report: expected models of one depth, got layers {depths}")
    dense = max(before for before, _ in counts.values())
    named = zip(readable(list(counts)), counts.values(), strict=True)
    return finished(_figure(dense, {name: of_layers for name, (_, of_layers) in named}), path)


def _figure(dense: int, counts: dict[str, Sequence[int]]) -> Figure:
    depth = len(next(iter(counts.values())))
    figure = new_figure(*SIZE)
    ends = _ends(dense, counts)
    room = max(width_of(figure, name, LABEL) for name, _, _ in ends)
    axes = new_axes(figure, 56, 42, round(room) + 26, 16)
    axes.set_xlim(0, depth)
    axes.set_ylim(0, 1.06 * max(dense, 1))
    axes.set_xticks([layer + 0.5 for layer in _ticks(depth)], [str(x) for x in _ticks(depth)])
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("visual tokens that enter it", fontsize=9)
    axes.plot([0, depth], [dense, dense], color=GREY, lw=1.2, ls=(0, (2, 2)))
    pruned = [line for name, line in counts.items() if name != DENSE]
    for index, line in enumerate(pruned):
        color = COLORS[index % len(COLORS)]
        style = {"color": color, "lw": 2, "ls": _LINES[index % len(_LINES)]}
        axes.stairs(line, range(depth + 1), baseline=None, **style)
        if len(pruned) == 1:
            axes.stairs(line, range(depth + 1), fill=True, color=color, alpha=0.15, lw=0)
    at_the_end(axes, ends)
    return figure


def _ends(dense: int, counts: dict[str, Sequence[int]]) -> list[tuple[str, float, str]]:
    """What stands at the end of each line, where, and in which color."""
    ends = [(DENSE, dense, GREY)]
    pruned = {name: line for name, line in counts.items() if name != DENSE}
    for index, (name, line) in enumerate(pruned.items()):
        share = f"{line[-1]:,} of {dense:,}"
        words = f"{name}: {share}" if name else share
        ends.append((words, line[-1], COLORS[index % len(COLORS)]))
    return ends


def _ticks(depth: int) -> range:
    return range(0, depth, max(1, -(-depth // 16)))


def _counts(report: Any, sample: int) -> tuple[int, Sequence[int]]:
    """Visual tokens of the prompt, and those entering each layer."""
    if isinstance(report, Sequence):
        return max(report, default=0), list(report)
    batch = len(report.dense_tokens)
    if not 0 <= sample < batch:
        raise ValueError(f"sample: expected 0 to {batch - 1}, got {sample}")
    left = [layer[sample] for layer in report.visual_tokens_per_layer]
    return report.visual_at_start(sample), left
