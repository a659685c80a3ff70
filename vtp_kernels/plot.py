"""Pictures of what was kept: the image with its dropped patches dimmed, layer by layer."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vtp_kernels.selection import Selection

PANEL = 224  # pixels; the width of one panel
CAPTION = 18
_GAP = 6
_MARGIN = 10  # around a curve
_DIM = 0.22  # brightness left to a patch whose token is gone


def tokens(
    image,
    kept: Mapping[int, torch.Tensor],
    path: str | os.PathLike | None = None,
    *,
    visual: torch.Tensor | None = None,
    sample: int = 0,
    grid: tuple[int, int] | None = None,
    title: str = "all",
) -> Image.Image:
    """Draws which visual tokens were kept, one panel per layer at which some left.

    Args:
        image: a `PIL.Image.Image` or a path: the picture the tokens came from.
        kept: `report().kept`: layer -> bool [B, S] over the original sequence, or bool [B, N] / [N]
            over the visual tokens alone.
        path: where to write the PNG; None writes nothing.
        visual: bool [B, S], which positions of the sequence are visual; default `kept.visual` when
            `kept` comes from a report, else every position.
        sample: row of the batch.
        grid: (rows, columns) of the visual tokens; default: square.
        title: caption of the first panel, which shows the whole picture.

    Returns:
        The drawn picture.

    Raises:
        ValueError: the tokens do not fill `grid`, or `sample` is not in the batch.
        OSError: the image cannot be read.
    """
    picture = load_image(image).resize((PANEL, PANEL))
    visual = visual if visual is not None else getattr(kept, "visual", None)
    masks = {layer: _visual_mask(mask, visual, sample) for layer, mask in sorted(kept.items())}
    row = [(title, picture)]
    for layer, mask in masks.items():
        rows, columns = grid or _square(mask.numel())
        if rows * columns != mask.numel():
            raise ValueError(
                f"grid: expected {mask.numel()} cells, one a visual token, got {rows} x {columns}"
            )
        caption = f"layer {layer}: {int(mask.sum())} of {mask.numel()}"
        row.append((caption, _dim(picture, mask.view(rows, columns))))
    drawn = panels(row)
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


def panels(row: list[tuple[str, Image.Image]]) -> Image.Image:
    """Puts captioned pictures side by side, all in one size."""
    sheet = Image.new("RGB", (len(row) * (PANEL + _GAP) - _GAP, PANEL + CAPTION + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, panel) in enumerate(row):
        left = i * (PANEL + _GAP)
        draw.text((left + 2, 2), caption, fill="black")
        sheet.paste(panel.resize((PANEL, PANEL), Image.NEAREST), (left, CAPTION))
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


def load_image(image) -> Image.Image:
    """An RGB picture from a path or a PIL image; ValueError names a file that is no picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"image: expected a path or a PIL image, got {type(image).__name__}")
    try:
        return Image.open(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image: no such file: {os.fspath(image)!r}") from None
    except OSError as error:
        raise ValueError(
            f"image: {os.fspath(image)!r} cannot be read as a picture: {error}"
        ) from error


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


def _visual_mask(mask: torch.Tensor, visual: torch.Tensor | None, sample: int) -> torch.Tensor:
    if mask.dim() == 1:
        mask = mask[None]
    if not 0 <= sample < mask.shape[0]:
        raise ValueError(f"sample: expected 0 to {mask.shape[0] - 1}, got {sample}")
    mask = mask[sample].cpu()
    return mask if visual is None else mask[visual[sample].cpu()]


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return side, side


def _dim(picture: Image.Image, mask: torch.Tensor) -> Image.Image:
    light = Image.fromarray((mask.to(torch.uint8) * 255).numpy(), "L").resize(
        picture.size, Image.NEAREST
    )
    dark = Image.blend(Image.new("RGB", picture.size, "black"), picture, _DIM)
    return Image.composite(picture, dark, light)
