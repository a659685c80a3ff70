"""MiniCPM-V 4.6 and 4.7, and MiniCPM-OCR: pictures and their slices before the language model
of Qwen3.5.

What `qwen3_5.py` says of layers with linear attention holds here. In 4.7 a visual token's position
is a place on a canvas, in the others it counts rows.

A picture, or a frame, that is cut comes as a whole and then in slices, each of them with a mark
before it and a mark behind it: `<image>` before what is whole, `<slice>` before slices, and a
newline between their rows. Where frames follow upon each other with no word between them but the
marks, they are of one video.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..towers import MiniCPMTower
from .family import Family
from .looks import Given, Looks, View, cells
from .placing import placed
from .qwen3_5 import LIMITS, ROTARY
from .squares import tiled
from .tiny import IMAGE, LINEAR, TEXT, VIDEO, Tiny, TinyVideo

__all__ = ["MiniCPMOcr", "MiniCPMV46", "MiniCPMV47"]


class Crop(NamedTuple):
    """What is encoded at once: a picture or a frame as a whole, or a slice of it. The columns first
    to last - 1 of a prompt have a token for each of its cells."""

    prompt: int
    first: int
    last: int
    rows: int
    columns: int


class MiniCPM(Family):
    text_models = ("qwen3_5_text",)
    towers = (MiniCPMTower,)
    limits = (
        *LIMITS,
        "videos that follow upon each other with no word between them count as one",
    )

    def looks(self, given: Given) -> list[Looks]:
        return [_look(crops) for crops in _together(given, "image")]

    def frames(self, given: Given) -> list[Looks]:
        """A canvas of several frames (`stack_frames`) is one frame here."""
        looks: list[Looks] = []
        video, frame, end = -1, 0, None
        for crops in _together(given, "video"):
            # </image><image> or </slice><image>
            follows = end == (crops[0].prompt, crops[0].first - MARKS_BETWEEN)
            video, frame = (video, frame + 1) if follows else (video + 1, 0)
            looks.append(_look(crops)._replace(video=video, frames=range(frame, frame + 1)))
            end = crops[-1].prompt, crops[-1].last
        return looks


class MiniCPMV46(MiniCPM):
    name = "minicpmv4_6"
    architectures = ("MiniCPMV4_6ForConditionalGeneration",)
    example = "openbmb/MiniCPM-V-4.6"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

        def make() -> Any:
            return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**CONFIG))

        return {"minicpmv4_6": Tiny(make, squares, **SIDE_BY_SIDE)}


class MiniCPMV47(MiniCPM):
    name = "minicpmv4_7"
    architectures = ("MiniCPMV4_7ForConditionalGeneration",)
    example = "openbmb/MiniCPM-V-4.7-1B"
    since = "5.23"
    grid_positions = True

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

        def make() -> Any:
            return MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**CONFIG, **MARKS))

        types = ("mm_token_type_ids",)
        return {"minicpmv4_7": Tiny(make, patches, types, **SIDE_BY_SIDE)}


class MiniCPMOcr(MiniCPM):
    name = "minicpm_ocr"
    architectures = ("MiniCPMOcrForConditionalGeneration",)
    example = "openbmb/MiniCPM-OCR-1.0"
    since = "5.23"

    def tiny(self) -> dict[str, Tiny]:
        from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration

        def make() -> Any:
            config = MiniCPMOcrConfig(**CONFIG, downsample_mode="16x")
            return MiniCPMOcrForConditionalGeneration(config)

        return {"minicpm_ocr": Tiny(make, patches, **SIDE_BY_SIDE)}


MARKS_BETWEEN = 2  # one that ends a crop, and one that begins the next
NOT_ITS_WORDS = (
    "input_ids: the words around pictures and slices are not those that the processor puts there: "
    "it is not known how they lie"
)


def _crops(given: Given, kind: str) -> list[Crop]:
    """Those of all pictures, or of all videos, in their order."""
    config = given.base.config
    sizes = given.grid("target_sizes" if kind == "image" else "target_sizes_videos")
    mode = given.arguments.get("downsample_mode") or config.downsample_mode
    high, wide = (
        (1 if mode == "4x" else 2) * side**config.merger_times for side in config.merge_kernel_size
    )
    grids = [(height // high, width // wide) for height, width in sizes]
    found: dict[int, Crop] = {}
    lengths, what = [rows * columns for rows, columns in grids], "slices"
    for place in placed(lengths, given.placeholders[kind], what, copied=True):
        first, last = int(place.columns[0]), int(place.columns[-1]) + 1
        if last - first != len(place.columns):
            raise ValueError(
                f"input_ids: the {len(place.columns)} visual tokens of a slice of prompt "
                f"{place.prompt} do not follow upon each other"
            )
        found.setdefault(place.index, Crop(place.prompt, first, last, *grids[place.index]))
    return list(found.values())


def _together(given: Given, kind: str) -> list[list[Crop]]:
    """The same by picture, or by frame: the whole of it, and its slices if it is cut."""
    crops = _crops(given, kind)
    # What is cut has two slices at least.
    if not any(a.prompt == b.prompt for a, b in zip(crops, crops[2:], strict=False)):
        return [[crop] for crop in crops]
    ids = torch.as_tensor(given.told("input_ids")).cpu()
    marks = [int(ids[crop.prompt, crop.first - 1]) if crop.first else None for crop in crops]
    # Where the model does not know the mark of a slice, it is not that of the first crop.
    known = getattr(given.base.config, "slice_start_id", None)
    found: list[list[Crop]] = []
    for crop, mark in zip(crops, marks, strict=True):
        is_slice = mark == known if known is not None else mark != marks[0]
        opens = not found or found[-1][0].prompt != crop.prompt
        if opens and is_slice:
            raise NotImplementedError(NOT_ITS_WORDS)
        if is_slice:
            found[-1].append(crop)
        else:
            found.append([crop])
    return found


def _look(crops: list[Crop]) -> Looks:
    at_once, *slices = crops
    views = (View("whole", cells(at_once.rows, at_once.columns)),)
    total = tokens = at_once.rows * at_once.columns
    total += sum(crop.rows * crop.columns for crop in slices)
    if not slices:
        return Looks(total, views)
    down, across = _slices(crops)
    first = slices[0]
    if all(crop[3:] == first[3:] for crop in slices):
        order = tiled(cells(first.rows, first.columns), down, across)
        return Looks(total, (*views, View("crops", tokens + order)))
    for number, crop in enumerate(slices):  # MiniCPM-OCR makes some smaller
        y, x = number // across, number % across
        box = x / across, y / down, (x + 1) / across, (y + 1) / down
        order = tokens + cells(crop.rows, crop.columns)
        views = (*views, View(f"crop {number + 1}", order, box))
        tokens += order.numel()
    return Looks(total, views)


def _slices(crops: list[Crop]) -> tuple[int, int]:
    """Rows and columns of slices of what is cut: one more word stands between two rows."""
    gaps = [b.first - a.last for a, b in pairwise(crops)]
    across = next((i for i, gap in enumerate(gaps) if i and gap > MARKS_BETWEEN), len(gaps))
    down = len(gaps) // across
    expected = [MARKS_BETWEEN + (i > 0 and i % across == 0) for i in range(down * across)]
    if gaps != expected or len(gaps) == 1:
        raise NotImplementedError(NOT_ITS_WORDS)
    return down, across


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 4,
}
CONFIG = {
    "vision_config": VISION,
    "insert_layer_id": 1,
    "text_config": TEXT | LINEAR | ROTARY | {"model_type": "qwen3_5_text"},
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
MARKS = {
    "image_start_id": 96,
    "image_end_id": 97,
    "slice_start_id": 94,
    "slice_end_id": 95,
    "newline_id": 93,
}


def patches(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Patches of a picture, side by side: 16, 12 or 6 tokens of 4 x 4 of them."""
    height, width = ((16, 16), (8, 24), (12, 8))[index]
    return {
        "pixel_values": torch.randn(1, 3, 4, 4 * height * width, generator=generator),
        "target_sizes": torch.tensor([[height, width]]),
    }


def frames(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Videos of 2, 3 or 64 frames of 8, 4 or 1 tokens."""
    count, height, width = ((2, 8, 16), (3, 8, 8), (64, 4, 4))[index]
    pixels = 4 * count * height * width
    return {
        "pixel_values_videos": torch.randn(1, 3, 4, pixels, generator=generator),
        "target_sizes_videos": torch.tensor([[height, width]] * count),
    }


SIDE_BY_SIDE: dict[str, Any] = {
    "linear": True,
    "side_by_side": True,
    "around": (96, 97),
    "video": TinyVideo(frames, before=(96,), after=(97,)),
}


def squares(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Of one size: transformers 5.17 takes no others in one call."""
    return patches(generator, 0)
