"""Captioned pictures in rows, put on one figure pixel by pixel."""

from __future__ import annotations

import os
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from .figure import INK, box_of, finished, new_figure, size_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = 18  # pixels over each picture
GAP = 6
_TEXT = 11.5  # pixels, so that a caption has room in CAPTION
_BOLD = 8  # pixels that a bold letter takes, about
HIGHEST = 16_383  # pixels that WebP can hold, which is the least of the usual formats
_DPI = 72  # at which a point is a pixel


class Cell(NamedTuple):
    caption: str
    picture: Image.Image


class Block(NamedTuple):
    """Rows of pictures in columns of `side` pixels; None leaves a place free.

    heads: one over each column, in several lines where it is long, or a single one over all.
    """

    rows: Sequence[Sequence[Cell | None]]
    side: int
    heads: Sequence[str] = ()

    @property
    def width(self) -> int:
        return max(map(len, self.rows)) * (self.side + GAP) - GAP

    @property
    def head_lines(self) -> list[list[str]]:
        """The lines of each head."""
        if len(self.heads) == 1:
            return [list(self.heads)]
        return [textwrap.wrap(head, round(self.side / _BOLD)) for head in self.heads]

    @property
    def head_height(self) -> int:
        return CAPTION * max(map(len, self.head_lines), default=0)

    @property
    def height(self) -> int:
        return self.head_height + sum(map(row_height, self.rows)) + GAP


def row_height(row: Sequence[Cell | None]) -> int:
    return max(cell.picture.height for cell in row if cell is not None) + CAPTION


def draw(blocks: Sequence[Block], path: str | os.PathLike | None = None) -> Image.Image:
    """The blocks under each other, left-aligned on white.

    Rows that would make it higher than `HIGHEST` are left out, and a last line says how many.
    """
    shown, left_out = _that_fit(blocks)
    height = sum(block.height for block in shown) + (CAPTION if left_out else 0)
    figure = new_figure(max(block.width for block in blocks), height, _DPI)
    top = 0
    for block in shown:
        _put(figure, block, top)
        top += block.height
    if left_out:
        words = f"{left_out} more rows: no room"
        write(figure, words, 0, top, size_of(figure)[0], weight="bold")
    return finished(figure, path)


def _that_fit(blocks: Sequence[Block]) -> tuple[list[Block], int]:
    """The first rows, all if they have room; and how many are left out."""
    room = HIGHEST
    if sum(block.height for block in blocks) > room:
        room -= CAPTION  # for the line that says so
    shown, left_out = [], 0
    for block in blocks:
        ends = list(accumulate(map(row_height, block.rows), initial=block.head_height + GAP))
        fit = 0 if left_out else max(bisect_right(ends, room) - 1, 0)
        left_out += len(block.rows) - fit
        room -= ends[fit]
        if fit:
            shown.append(block._replace(rows=block.rows[:fit]))
    return shown, left_out


def _put(figure: Figure, block: Block, top: int) -> None:
    height = size_of(figure)[1]
    pitch = block.side + GAP
    room = block.side if len(block.heads) > 1 else size_of(figure)[0]
    for column, lines in enumerate(block.head_lines):
        for index, line in enumerate(lines):
            write(figure, line, column * pitch, top + index * CAPTION, room, weight="bold")
    top += block.head_height
    for row in block.rows:
        for column, cell in enumerate(row):
            if cell is None:
                continue
            write(figure, cell.caption, column * pitch, top, block.side)
            pixels = np.asarray(cell.picture.convert("RGB"))
            figure.figimage(pixels, column * pitch, height - top - CAPTION - len(pixels))
        top += row_height(row)


def write(figure: Figure, words: str, left: int, top: int, room: int, **look) -> None:
    """One line of text, cut off with an ellipsis where it has no room."""
    width, height = size_of(figure)
    place = ((left + 2) / width, 1 - (top + CAPTION - 5) / height)
    text = figure.text(
        *place, "", fontsize=_TEXT, color=INK, va="baseline", parse_math=False, **look
    )

    def ends(count: int) -> float:
        """Where so many letters of it end."""
        text.set_text(words if count == len(words) else words[:count].rstrip() + "…")
        return box_of(text)[2]

    if ends(len(words)) > left + room:
        fits = bisect_right(range(1, len(words)), left + room, key=ends)
        ends(max(fits, 1))
