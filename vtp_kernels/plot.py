"""Pictures of what was kept: the image with its dropped patches dimmed, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vtp_kernels.pictures import load_image
from vtp_kernels.selection import Selection

if TYPE_CHECKING:
    from vtp_kernels.models.pictures.grids import PictureGrid

PANEL = 224  # pixels; the longer side of one panel
CAPTION = 18
_GAP = 6
_MARGIN = 10  # around a curve
FRAME = 112  # pixels; the longer side of a frame on a sheet of them
FRAMES_IN_A_ROW = 8
_DIM = 0.22  # what is left of a patch whose token is gone: the rest is black


class _Look(NamedTuple):
    """A row of panels: `stayed` {layer: bool [H, W]}, whose cells lie at `box` of the picture."""

    picture: Image.Image
    name: str
    stayed: dict[int, Tensor]
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def tokens(
    image,
    kept,
    path: str | os.PathLike | None = None,
    *,
    visual: torch.Tensor | None = None,
    sample: int = 0,
    grid: tuple[int, int] | None = None,
    grids: Sequence[PictureGrid] | None = None,
    title: str = "all",
) -> Image.Image:
    """Draws which visual tokens were kept, one panel per layer at which some left.

    Every picture has a row of panels; two where the model looks at it twice, as a whole and in
    crops. What of a picture the model is not shown at all is white. Every video has a sheet of its
    frames per layer, with the number of each and the share of its tokens that was kept.

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
            or `sample` is not in the batch.
        OSError: the image cannot be read.
    """
    pictures = [_loaded(one) for one in _listed(image)]
    grids = getattr(kept, "grids", None) if grids is None else grids
    kept = getattr(kept, "kept", kept)
    visual = getattr(kept, "visual", None) if visual is None else visual
    masks = {layer: _row(mask, sample) for layer, mask in sorted(kept.items())}
    if grids is None:
        if any(isinstance(one, list) for one in pictures):
            raise ValueError(
                "grids: which token shows which frame of a video only the grids of "
                "picture_grids(model, inputs) tell; pass them"
            )
        looks = _looks_by_order(
            pictures, masks, None if visual is None else _row(visual, sample), grid
        )
        drawn = stack([_panels_of(look, title) for look in looks])
    else:
        drawn = stack(
            _drawn_by_grids(pictures, masks, [x for x in grids if x.prompt == sample], title)
        )
    if path is not None:
        drawn.save(Path(path))
    return drawn


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
    """
    scores, above, count = _curve_of(selection, sample)
    knee = count - above - 1
    sheet = Image.new("RGB", (PANEL, PANEL), "white")
    pen = ImageDraw.Draw(sheet)
    low, high = (min(scores), max(scores)) if scores else (0.0, 0.0)
    span, reach = PANEL - 2 * _MARGIN, (high - low) or 1.0

    def place(rank: int, score: float) -> tuple[float, float]:
        x = _MARGIN + span * rank / max(len(scores) - 1, 1)
        return x, PANEL - _MARGIN - span * (score - low) / reach

    pen.rectangle((_MARGIN, _MARGIN, PANEL - _MARGIN, PANEL - _MARGIN), outline="gainsboro")
    if 0 <= knee < len(scores):
        x, y = place(knee, scores[knee])
        pen.line((x, _MARGIN, x, PANEL - _MARGIN), fill="crimson")
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline="crimson", width=2)
    pen.line([place(rank, score) for rank, score in enumerate(scores)], fill="black", width=2)
    note = f"{count} of {selection[1].shape[1]}, {low:.3g} to {high:.3g}"
    pen.text((PANEL - _MARGIN - 6 * len(note), _MARGIN + 4), note, fill="black")
    if path is not None:
        sheet.save(Path(path))
    return sheet


def over_time(
    report,
    path: str | os.PathLike | None = None,
    *,
    sample: int = 0,
    video: int = 0,
) -> Image.Image:
    """Draws how many tokens of each frame of a video were kept, a line per layer at which some
    left, the later the darker. The left end is the first frame, the top all of a frame's tokens.

    Args:
        report: of a call with a video.
        path: where to write the PNG; None writes nothing.
        sample: row of the batch.
        video: which of its videos, from 0.

    Raises:
        ValueError: the prompt has no such video, the family does not tell its frames, or nothing
            left.
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
    sheet = Image.new("RGB", (2 * PANEL, PANEL), "white")
    pen, wide, high = ImageDraw.Draw(sheet), 2 * (PANEL - _MARGIN), PANEL - 2 * _MARGIN - CAPTION
    bottom = PANEL - _MARGIN
    pen.rectangle((_MARGIN, bottom - high, _MARGIN + wide, bottom), outline="gainsboro")
    layers = sorted(frames[0]["kept"])
    for rank, layer in enumerate(layers):
        points = []
        for index, unit in enumerate(frames):  # each has a stretch of its own
            y = bottom - high * unit["kept"][layer] / unit["tokens"]
            points += [(_MARGIN + wide * (index + end) / len(frames), y) for end in (0, 1)]
        shade = 160 - 160 * (rank + 1) // len(layers)
        pen.line(points, fill=(shade, shade, shade), width=2)
    names = ", ".join(map(str, layers))
    shown = frames[-1]["frames"][-1] + 1
    pen.text((_MARGIN, 4), f"{shown} frames, kept at layer {names}", fill="black")
    if path is not None:
        sheet.save(Path(path))
    return sheet


def panels(row: list[tuple[str, Image.Image]]) -> Image.Image:
    """Puts captioned pictures side by side, each as large as fits into a panel."""
    fitted = [(caption, _fitted(panel, Image.NEAREST)) for caption, panel in row]
    height = max(panel.height for _, panel in fitted)
    sheet = Image.new("RGB", (len(row) * (PANEL + _GAP) - _GAP, height + CAPTION + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, panel) in enumerate(fitted):
        left = i * (PANEL + _GAP)
        draw.text((left + 2, 2), caption, fill="black")
        sheet.paste(panel, (left, CAPTION))
    return sheet


def stack(rows: list[Image.Image], path: str | os.PathLike | None = None) -> Image.Image:
    """Puts pictures under each other, left-aligned on white; used to compare methods."""
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    if path is not None:
        sheet.save(Path(path))
    return sheet


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


def _listed(image) -> list:
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _loaded(image) -> Image.Image | list[Image.Image]:
    """A picture, or the frames of a video."""
    if isinstance(image, (list, tuple)):
        return [load_image(frame) for frame in image]
    return load_image(image)


def _row(mask: Tensor, sample: int) -> Tensor:
    if mask.dim() == 1:
        mask = mask[None]
    if not 0 <= sample < mask.shape[0]:
        raise ValueError(f"sample: expected 0 to {mask.shape[0] - 1}, got {sample}")
    return mask[sample].cpu()


def _drawn_by_grids(
    pictures: list, masks: dict[int, Tensor], grids: list[PictureGrid], title: str
) -> list[Image.Image]:
    """A row of panels for each look at each picture, and a sheet for each video and layer."""
    shown: dict[tuple, list[PictureGrid]] = {}
    for index, grid in enumerate(grids):
        key = ("picture", index) if grid.frames is None else ("video", grid.video)
        shown.setdefault(key, []).append(grid)
    if len(pictures) != len(shown):
        raise ValueError(
            f"image: expected the {len(shown)} pictures of the prompt, got {len(pictures)}; a "
            "video is a sequence of frames"
        )
    _check_width(masks, grids)
    drawn, videos = [], 0
    for index, (picture, of_it) in enumerate(zip(pictures, shown.values(), strict=True)):
        if of_it[0].frames is None:
            if isinstance(picture, list):
                raise ValueError(
                    f"image: number {index + 1} in the prompt is a picture, got frames"
                )
            name = _number(index - videos, len(pictures))
            drawn += [_panels_of(look, title) for look in _looks_at(picture, name, of_it[0], masks)]
        else:
            _check_frames(picture, of_it, index)
            name, videos = f"video {videos + 1}", videos + 1
            for layer, mask in masks.items():
                drawn.append(_sheet(picture, of_it, mask, f"{title}: {name}, layer {layer}"))
    return drawn


def _check_frames(frames: Any, grids: list[PictureGrid], index: int) -> None:
    first, last = grids[-1].frames[0], grids[-1].frames[-1]
    if not isinstance(frames, list) or not first < len(frames) <= last + 1:
        got = f"{len(frames)} frames" if isinstance(frames, list) else "a picture"
        raise ValueError(
            f"image: number {index + 1} in the prompt is a video of {last + 1} frames, got {got}"
        )


def _sheet(
    frames: list[Image.Image], grids: list[PictureGrid], mask: Tensor, title: str
) -> Image.Image:
    """The frames of a video, each with its number, from 1, and the share of its tokens kept."""
    cells, kept, tokens = [], 0, 0
    for grid in grids:
        view = grid.views[0]
        stayed = mask[grid.columns[view.tokens]]
        kept, tokens = kept + int(stayed.sum()), tokens + stayed.numel()
        numbers = f"{grid.frames[0] + 1}"
        if len(grid.frames) > 1:
            numbers += f"-{grid.frames[-1] + 1}"
        share = round(100 * int(stayed.sum()) / stayed.numel())
        frame = _fitted(frames[grid.frames[0]], size=FRAME)
        cells.append((f"{numbers}: {share} %", _dim(frame, stayed, view.box)))
    high = max(cell.height for _, cell in cells) + CAPTION
    in_a_row = min(len(cells), FRAMES_IN_A_ROW)
    rows = -(-len(cells) // in_a_row)
    size = (in_a_row * (FRAME + _GAP) - _GAP, CAPTION + rows * high + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 2), f"{title}: {kept} of {tokens}", fill="black")
    for index, (caption, cell) in enumerate(cells):
        left = index % in_a_row * (FRAME + _GAP)
        top = CAPTION + index // in_a_row * high
        pen.text((left + 2, top + 2), caption, fill="black")
        sheet.paste(cell, (left, top + CAPTION))
    return sheet


def _check_width(masks: dict[int, Tensor], grids: list[PictureGrid]) -> None:
    needed = max((int(grid.columns.max()) + 1 for grid in grids), default=0)
    for mask in masks.values():
        if len(mask) < needed:
            raise ValueError(
                f"kept: with grids expected bool [B, S] over the whole sequence, at least {needed} "
                f"columns, got {len(mask)}"
            )


def _looks_at(
    picture: Image.Image, name: str, grid: PictureGrid, masks: dict[int, Tensor]
) -> list[_Look]:
    looks = []
    for view in grid.views:
        names = [name, view.name if len(grid.views) > 1 else ""]
        columns = grid.columns[view.tokens]
        stayed = {layer: mask[columns] for layer, mask in masks.items()}
        looks.append(_Look(picture, ", ".join(filter(None, names)), stayed, view.box))
    return looks


def _looks_by_order(
    pictures: list[Image.Image],
    masks: dict[int, Tensor],
    visual: Tensor | None,
    grid: tuple[int, int] | None,
) -> list[_Look]:
    """Visual tokens belong to the pictures in turn: each stretch of them to one, or if there is
    one stretch, equal parts of it."""
    if visual is None:
        counts = {layer: len(mask) for layer, mask in masks.items()}
        runs = [max(counts.values(), default=0)]
    else:
        stretches, lengths = torch.unique_consecutive(visual, return_counts=True)
        runs = lengths[stretches].tolist()
        masks = {layer: mask[visual] for layer, mask in masks.items()}
    if len(runs) == 1 and runs[0] % len(pictures) == 0:
        runs = [runs[0] // len(pictures)] * len(pictures)
    if len(runs) != len(pictures):
        raise ValueError(
            f"image: the visual tokens stand in {len(runs)} places of the prompt, got "
            f"{len(pictures)} pictures; pass all of them, and the grids of picture_grids(model, "
            "inputs)"
        )
    looks = []
    for index, (picture, run) in enumerate(zip(pictures, runs, strict=True)):
        first = sum(runs[:index])
        rows, columns = grid or (round(run**0.5),) * 2
        if rows * columns != run:
            raise ValueError(
                f"grid: expected {run} cells, one a visual token, got {rows} x {columns}; for what "
                "is no square of them pass the grids of picture_grids(model, inputs)"
            )
        stayed = {
            layer: mask[first : first + run].view(rows, columns) for layer, mask in masks.items()
        }
        looks.append(_Look(picture, _number(index, len(pictures)), stayed))
    return looks


def _number(index: int, count: int) -> str:
    return f"picture {index + 1}" if count > 1 else ""


def _panels_of(look: _Look, title: str) -> Image.Image:
    picture = _fitted(look.picture)
    row = [(": ".join(filter(None, (title, look.name))), picture)]
    for layer, mask in look.stayed.items():
        caption = f"layer {layer}: {int(mask.sum())} of {mask.numel()}"
        row.append((caption, _dim(picture, mask, look.box)))
    return panels(row)


def _fitted(picture: Image.Image, resample: int | None = None, size: int = PANEL) -> Image.Image:
    """As large as a panel has room for."""
    scale = size / max(picture.size)
    return picture.resize([max(round(side * scale), 1) for side in picture.size], resample)


def _dim(picture: Image.Image, mask: Tensor, box: tuple[float, float, float, float]) -> Image.Image:
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, picture.size * 2, strict=True)
    )
    cells = Image.fromarray((mask.to(torch.uint8) * 255).numpy())
    light = Image.new("L", picture.size)
    light.paste(cells.resize((right - left, bottom - top), Image.NEAREST), (left, top))
    dark = Image.blend(Image.new("RGB", picture.size, "black"), picture, _DIM)
    shown = Image.new("L", picture.size)
    shown.paste(255, (left, top, right, bottom))
    unseen = Image.new("RGB", picture.size, "white")
    return Image.composite(Image.composite(picture, dark, light), unseen, shown)
