"""What of which picture stayed, from masks over a sequence: what drawings of it show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vtp_kernels.pictures import load_image

if TYPE_CHECKING:
    from vtp_kernels.models.pictures.grids import PictureGrid

_DIM = 0.22  # what is left of a patch whose token is gone: the rest is black

Box = tuple[float, float, float, float]


class Look(NamedTuple):
    """A look that the model takes at a picture: `stayed` {layer: bool [H, W]}, whose cells lie at
    `box` of it, in shares of its size. What lies outside of that is not shown to the model.

    name: of the picture and of the look, where there are several; else "".
    """

    picture: Image.Image
    name: str
    stayed: dict[int, Tensor]
    box: Box = (0.0, 0.0, 1.0, 1.0)


class Film(NamedTuple):
    """A video: the frames that have tokens, named by their numbers, from 1, as "3" or "3-4"."""

    name: str
    frames: list[Look]


def looks_of(
    image: Any,
    kept: Any,
    *,
    visual: Tensor | None,
    sample: int,
    grid: tuple[int, int] | None,
    grids: Sequence[PictureGrid] | None,
) -> list[Look | Film]:
    """In the order of the pictures and videos in the prompt; arguments as those of `tokens`."""
    pictures = [_loaded(one) for one in _listed(image)]
    grids = getattr(kept, "grids", None) if grids is None else grids
    kept = getattr(kept, "kept", kept)
    visual = getattr(kept, "visual", None) if visual is None else visual
    masks = {layer: _row(mask, sample) for layer, mask in sorted(kept.items())}
    if grids is not None:
        return _by_grids(pictures, masks, [x for x in grids if x.prompt == sample])
    if any(isinstance(one, list) for one in pictures):
        raise ValueError(
            "grids: which token shows which frame of a video only the grids of "
            "picture_grids(model, inputs) tell; pass them"
        )
    return _by_order(pictures, masks, None if visual is None else _row(visual, sample), grid)


def fitted(picture: Image.Image, size: int, resample: int | None = None) -> Image.Image:
    """So large that its longer side has `size` pixels."""
    scale = size / max(picture.size)
    return picture.resize([max(round(side * scale), 1) for side in picture.size], resample)


def dimmed(picture: Image.Image, stayed: Tensor, box: Box) -> Image.Image:
    """The picture, with dark what has left, and white what the model is not shown."""
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, picture.size * 2, strict=True)
    )
    cells = Image.fromarray((stayed.to(torch.uint8) * 255).numpy())
    light = Image.new("L", picture.size)
    light.paste(cells.resize((right - left, bottom - top), Image.NEAREST), (left, top))
    dark = Image.blend(Image.new("RGB", picture.size, "black"), picture, _DIM)
    shown = Image.new("L", picture.size)
    shown.paste(255, (left, top, right, bottom))
    unseen = Image.new("RGB", picture.size, "white")
    return Image.composite(Image.composite(picture, dark, light), unseen, shown)


def _listed(image: Any) -> list:
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _loaded(image: Any) -> Image.Image | list[Image.Image]:
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


def _number(index: int, count: int) -> str:
    return f"picture {index + 1}" if count > 1 else ""


# --- by the grids that the family tells -----------------------------------------------------------


def _by_grids(
    pictures: list, masks: dict[int, Tensor], grids: list[PictureGrid]
) -> list[Look | Film]:
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
    found: list[Look | Film] = []
    videos = 0
    for index, (picture, of_it) in enumerate(zip(pictures, shown.values(), strict=True)):
        if of_it[0].frames is None:
            if isinstance(picture, list):
                raise ValueError(
                    f"image: number {index + 1} in the prompt is a picture, got frames"
                )
            found += _looks_at(picture, _number(index - videos, len(pictures)), of_it[0], masks)
        else:
            _check_frames(picture, of_it, index)
            videos += 1
            found.append(Film(f"video {videos}", [_frame(picture, x, masks) for x in of_it]))
    return found


def _check_width(masks: Mapping[int, Tensor], grids: list[PictureGrid]) -> None:
    needed = max((int(grid.columns.max()) + 1 for grid in grids), default=0)
    for mask in masks.values():
        if len(mask) < needed:
            raise ValueError(
                f"kept: with grids expected bool [B, S] over the whole sequence, at least {needed} "
                f"columns, got {len(mask)}"
            )


def _check_frames(frames: Any, grids: list[PictureGrid], index: int) -> None:
    if not all(grid.views for grid in grids):
        raise NotImplementedError(
            f"image: number {index + 1} in the prompt is a video, and of some of its frames the "
            "model was given some tokens alone, it is not told which"
        )
    first, last = grids[-1].frames[0], grids[-1].frames[-1]
    if not isinstance(frames, list) or not first < len(frames) <= last + 1:
        got = f"{len(frames)} frames" if isinstance(frames, list) else "a picture"
        raise ValueError(
            f"image: number {index + 1} in the prompt is a video of {last + 1} frames, got {got}"
        )


def _looks_at(
    picture: Image.Image, name: str, grid: PictureGrid, masks: dict[int, Tensor]
) -> list[Look]:
    looks = []
    for view in grid.views:
        names = [name, view.name if len(grid.views) > 1 else ""]
        columns = grid.columns[view.tokens]
        stayed = {layer: mask[columns] for layer, mask in masks.items()}
        looks.append(Look(picture, ", ".join(filter(None, names)), stayed, view.box))
    return looks


def _frame(frames: list[Image.Image], grid: PictureGrid, masks: dict[int, Tensor]) -> Look:
    """Of frames that share their tokens the first is shown."""
    numbers = f"{grid.frames[0] + 1}"
    if len(grid.frames) > 1:
        numbers += f"-{grid.frames[-1] + 1}"
    view = grid.views[0]
    columns = grid.columns[view.tokens]
    stayed = {layer: mask[columns] for layer, mask in masks.items()}
    return Look(frames[grid.frames[0]], numbers, stayed, view.box)


# --- by the order of visual tokens ----------------------------------------------------------------


def _by_order(
    pictures: list[Image.Image],
    masks: dict[int, Tensor],
    visual: Tensor | None,
    grid: tuple[int, int] | None,
) -> list[Look | Film]:
    """Visual tokens belong to the pictures in turn: each stretch of them to one, or if there is
    one stretch, equal parts of it."""
    if not masks:
        return [Look(one, _number(i, len(pictures)), {}) for i, one in enumerate(pictures)]
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
    looks: list[Look | Film] = []
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
        looks.append(Look(picture, _number(index, len(pictures)), stayed))
    return looks
