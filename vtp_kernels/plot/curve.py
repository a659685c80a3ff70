"""The sorted scores of a picture and their knee."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vtp_kernels.selection import Selection

from .figure import COLORS, FAINT, GREY, finished, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (256, 200)  # pixels


def curve(
    selection: tuple[Selection, torch.Tensor],
    path: str | os.PathLike | None = None,
    *,
    sample: int = 0,
) -> Image.Image:
    """Draws the sorted scores of one picture and their knee: what comes up to it was kept.

    Args:
        selection: what `vtp_kernels.cls_inflection` returns: the Selection and the scores [B, N].
            With `vtp_kernels.inflection` the pair is (its result, the curve it was given).
        path: where to write the PNG; None writes nothing.
        sample: row of the batch.

    Returns:
        The drawn curve. Scores that are no finite numbers are left out.

    Raises:
        TypeError: `selection` is no such pair.
        ValueError: its parts do not belong together, or `sample` is not in the batch.
        ImportError: matplotlib is missing.
    """
    scores, above, count = _curve_of(selection, sample)
    return finished(_figure(scores, above, count, selection[1].shape[1]), path)


def _figure(scores: list[float], above: int, count: int, tokens: int) -> Figure:
    """`scores` in falling order, of which `above` more, infinite ones, are ahead."""
    figure = new_figure(*SIZE)
    axes = new_axes(figure, 42, 34, 10, 12)
    ranks = range(above + 1, above + len(scores) + 1)
    if 0 < count - above <= len(scores):
        knee = (count, scores[count - above - 1])
        axes.axvspan(above + 1, count, color=COLORS[5], alpha=0.25, linewidth=0)
        axes.axvline(count, color=COLORS[1], linewidth=1)
        axes.plot(*knee, "o", color=COLORS[1], markersize=5, zorder=3)
    axes.plot(ranks, scores, color=COLORS[0], linewidth=1.5)
    axes.set_xlabel("tokens, best first", fontsize=8, labelpad=2)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.text(
        *(0.97, 0.94, f"{count} of {tokens} kept"),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    if not scores:
        axes.set_yticks([])
    axes.tick_params(color=GREY)
    return figure


def _curve_of(selection, sample: int) -> tuple[list[float], int, int]:
    """Finite scores in falling order, how many are infinite, and how many tokens were kept."""
    if not (
        isinstance(selection, tuple)
        and len(selection) == 2
        and isinstance(selection[0], Selection)
        and isinstance(selection[1], torch.Tensor)
    ):
        raise TypeError(
            "selection: expected the pair (Selection, scores) that cls_inflection returns, got "
            f"{type(selection).__name__}"
        )
    (_, counts), scores = selection
    if scores.dim() != 2 or len(scores) != len(counts):
        raise ValueError(f"selection: expected scores [{len(counts)}, N], got {list(scores.shape)}")
    if not 0 <= sample < len(counts):
        raise ValueError(f"sample: expected 0 to {len(counts) - 1}, got {sample}")
    row = scores[sample].float()
    finite = row[row.isfinite()].sort(descending=True)[0].tolist()
    return finite, int(row.isposinf().sum()), int(counts[sample])
