"""What everything is drawn on: a matplotlib figure in pixels, without pyplot and its state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vtp_kernels.pictures import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

INK, GREY, FAINT = "#222222", "#6b6b6b", "#dddddd"
#: Okabe and Ito's, which colour-blind people tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: For those who see no colours at all, and for more than there are.
MARKERS = "osD^vPX"
DPI = 100


def check_matplotlib() -> None:
    """Raise ImportError, saying what to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures are drawn with matplotlib, which is not installed here: pip install "
            "'vtp_kernels[plot]', or matplotlib itself"
        ) from error


def new_figure(width: int, height: int, dpi: int = DPI) -> Figure:
    """White, of that many pixels. Nobody else's backend or style changes how it looks."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, left: int, bottom: int, right: int, top: int) -> Axes:
    """Axes with these margins in pixels, of two thin lines and no box."""
    width, height = size_of(figure)
    room = (left / width, bottom / height)
    axes = figure.add_axes((*room, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=8, length=3)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
    return axes


def darker(color: str) -> str:
    """Of the same hue, for words, which are thinner than lines and marks."""
    from matplotlib.colors import to_hex, to_rgb

    return to_hex([0.7 * part for part in to_rgb(color)])


def width_of(figure: Figure, words: str, size: float) -> float:
    """Pixels that a line of text of so many points takes."""
    text = figure.text(0, 0, words, fontsize=size, parse_math=False)
    left, _, right, _ = box_of(text)
    text.remove()
    return right - left


def size_of(figure: Figure) -> tuple[int, int]:
    return tuple(round(inches * figure.dpi) for inches in figure.get_size_inches())


def box_of(text: Text) -> tuple[float, float, float, float]:
    """Where a text is: left, bottom, right, top in pixels of the figure."""
    box = text.get_window_extent(text.figure.canvas.get_renderer())
    return box.x0, box.y0, box.x1, box.y1


def finished(figure: Figure, path: str | os.PathLike | None) -> Image.Image:
    """The figure as a picture, written to `path` unless that is None.

    Raises:
        ValueError: PIL writes no pictures with the suffix of `path`.
        OSError: no file can be written there.
    """
    if path is not None:
        check_writable(path, "path")
    figure.canvas.draw()
    size = figure.canvas.get_width_height()
    drawn = Image.frombytes("RGBA", size, bytes(figure.canvas.buffer_rgba())).convert("RGB")
    if path is not None:
        try:
            drawn.save(Path(path))
        except OSError as error:
            raise OSError(f"path: cannot write {str(Path(path))!r}: {error}") from error
    return drawn
