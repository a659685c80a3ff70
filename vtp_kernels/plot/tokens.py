"""The pictures of a prompt with their dropped patches dimmed, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .looks import Film, Look, dimmed, fitted, looks_of
from .sheet import Block, Cell, draw

if TYPE_CHECKING:
    from vtp_kernels.models.pictures.grids import PictureGrid

PANEL = 224  # pixels; the longer side of one panel
SMALL = 160  # the same where methods stand side by side
FRAME = 112  # the same of a frame on a sheet of them
FRAMES_IN_A_ROW = 8
ALL = "all"  # what the first panel of a picture shows


def tokens(
    image,
    kept,
    path: str | os.PathLike | None = None,
    *,
    visual: Tensor | None = None,
    sample: int = 0,
    grid: tuple[int, int] | None = None,
    grids: Sequence[PictureGrid] | None = None,
    title: str = ALL,
) -> Image.Image:
    """Draws which visual tokens were kept, one panel per layer at which some left.

    Every picture has a row of panels; two where the model looks at it twice, as a whole and in
    crops. What of a picture the model is not shown at all is white. Every video has a sheet of its
    frames per layer, with the number of each and the share of its tokens that was kept. A drawing
    is at most 16,383 pixels high; of what has no room on it, a last line counts the rows.

    Args:
        image: a `PIL.Image.Image` or a path: the picture the tokens came from. A sequence of them
            for a prompt with several, in their order; a video among them is a sequence of its
            frames, and needs `grids`. Of frames that share their tokens the first is drawn.
        kept: a report, or its `kept`: layer -> bool [B, S] over the original sequence; or bool
            [B, N] / [N] over the visual tokens alone.
        path: where to write the PNG; None writes nothing.
        visual: bool [B, S], which positions of the sequence are visual; default `kept.visual` when
            `kept` comes from a report, else every position.
        sample: row of the batch.
        grid: (rows, columns) of each picture's visual tokens, where all of these are cells of one
            grid; default: square.
        grids: what `vtp_kernels.picture_grids(model, inputs)` says: for pictures of
            any shape, crops, and a picture at the end of its prompt. In place of `grid` and
            `visual`. Default: those of the report, if it has them.
        title: caption of the first panel, which shows the whole picture.

    Returns:
        The drawn picture.

    Raises:
        ValueError: the tokens do not fill `grid`, there are more pictures than `image`, or fewer,
            or `sample` is not in the batch; or `path` does not end as pictures do.
        OSError: the image cannot be read, or `path` not be written.
        ImportError: matplotlib is missing.
    """
    looks = looks_of(image, kept, visual=visual, sample=sample, grid=grid, grids=grids)
    return draw([block for look in looks for block in _blocks(look, title)], path)


def methods(
    image,
    reports: Mapping[str, Any],
    path: str | os.PathLike | None = None,
    *,
    visual: Tensor | None = None,
    sample: int = 0,
    grid: tuple[int, int] | None = None,
    grids: Sequence[PictureGrid] | None = None,
) -> Image.Image:
    """Draws what several methods kept of the same pictures: a column a method, and in it a panel
    for each layer at which tokens left. Videos are drawn as `tokens` draws them, one method after
    the other.

    Args:
        reports: name -> what `tokens` takes as `kept`.
        image, path, visual, sample, grid, grids: as of `tokens`.

    Returns, raises: as `tokens`; ValueError if there is no method.
    """
    if not reports:
        raise ValueError("reports: expected at least one method, got none")
    options = {"visual": visual, "sample": sample, "grid": grid, "grids": grids}
    found = {name: looks_of(image, kept, **options) for name, kept in reports.items()}
    blocks = []
    for of_one in zip(*found.values(), strict=True):
        if isinstance(of_one[0], Look):
            blocks.append(_side_by_side(list(found), of_one))
            continue
        for name, film in zip(found, of_one, strict=True):
            blocks += _blocks(film, name)
    return draw(blocks, path)


def panels(image, kept, size: int) -> tuple[Cell, list[Cell]]:
    """The one picture of a prompt, and its panels, for drawings that have more beside them."""
    options = {"visual": None, "sample": 0, "grid": None, "grids": None}
    (look,) = looks_of(image, kept, **options)
    return Cell(ALL, fitted(look.picture, size)), _panels(look, size)


def one_or_several(
    image, reports: Mapping[str, Any], path: str | os.PathLike, **options: Any
) -> None:
    """One method layer by layer, by `tokens`; several side by side, by `methods`."""
    if len(reports) > 1:
        methods(image, reports, path, **options)
        return
    ((name, report),) = reports.items()
    tokens(image, report, path, title=name, **options)


def _blocks(look: Look | Film, title: str) -> list[Block]:
    if isinstance(look, Film):
        layers = look.frames[0].stayed
        head = look.name if title == ALL else f"{title}: {look.name}"
        return [_sheet(look, layer, f"{head}, layer {layer}") for layer in layers]
    caption = ": ".join(filter(None, (look.name, title)))  # a long title is cut off
    return [Block([[Cell(caption, fitted(look.picture, PANEL)), *_panels(look, PANEL)]], PANEL)]


def _side_by_side(names: list[str], looks: Sequence[Look]) -> Block:
    """The picture, and beside it a column a method."""
    first = looks[0]
    shown = max((mask.numel() for look in looks for mask in look.stayed.values()), default=0)
    picture = Cell(f"{shown} tokens" if shown else "", fitted(first.picture, SMALL))
    columns = [[picture], *(_panels(look, SMALL) or [_untouched(look)] for look in looks)]
    depth = max(map(len, columns))
    padded = [column + [None] * (depth - len(column)) for column in columns]
    rows = list(zip(*padded, strict=True))
    return Block(rows, SMALL, [first.name or "picture", *names])


def _panels(look: Look, size: int) -> list[Cell]:
    picture = fitted(look.picture, size)
    return [
        Cell(f"layer {layer}: {int(mask.sum())} of {mask.numel()}", dimmed(picture, mask, look.box))
        for layer, mask in look.stayed.items()
    ]


def _untouched(look: Look) -> Cell:
    return Cell("all stay", fitted(look.picture, SMALL))


def _sheet(film: Film, layer: int, title: str) -> Block:
    """The frames of a video, each with its number, from 1, and the share of its tokens kept."""
    cells, kept, total = [], 0, 0
    for frame in film.frames:
        stayed = frame.stayed[layer]
        count = int(stayed.sum())
        kept, total = kept + count, total + stayed.numel()
        caption = f"{frame.name}: {round(100 * count / stayed.numel())} %"
        cells.append(Cell(caption, dimmed(fitted(frame.picture, FRAME), stayed, frame.box)))
    rows = [cells[i : i + FRAMES_IN_A_ROW] for i in range(0, len(cells), FRAMES_IN_A_ROW)]
    return Block(rows, FRAME, [f"{title}: {kept} of {total}"])
