"""A page to look at: what of the pictures was left at every layer, and why."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtp_kernels._shown import shown

from .looks import Film, Look, fitted, looks_of
from .names import of_reports

if TYPE_CHECKING:
    from vtp_kernels.models import Report
    from vtp_kernels.models.pictures.grids import PictureGrid

MOST_BYTES = 2_000_000
SIDES = (900, 640, 448, 320, 224)  # pixels of a picture's longer side: the first that fits
FRAME = 0.3  # of that, a frame's
QUALITY = 85  # of JPEG
TAB = 48  # characters on a prompt's tab


def page(
    image: Any,
    report: Report | Sequence[Report],
    path: str | os.PathLike,
    *,
    prompt: Sequence[str] | Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
    grids: Sequence[PictureGrid] | None = None,
    grid: tuple[int, int] | None = None,
    title: str = "What was kept",
) -> None:
    """Writes an HTML file in which one goes through the layers and sees what is left of each
    picture, which token left where, with what score, and what each layer costs.

    The file is complete in itself, below 2 MB, and loads nothing: pictures and frames are made
    smaller until they fit. Prompts and names are shown as they are, whatever is in them.

    Args:
        image: as of `tokens`: the picture, or a sequence of the pictures and videos of a prompt.
            Prompts of a batch have the same; where they do not, a mapping {prompt: pictures}.
        report: what `report()` said; several of the same inputs are shown side by side.
        path: where to write it.
        prompt: the tokens of the input as strings, S of them, as a tokenizer's
            `convert_ids_to_tokens` or `decode` one by one gives them; for a batch B such sequences.
            Default: text is told by its numbers.
        names: of the reports; default: their methods in words.
        grids: what `vtp_kernels.picture_grids(model, inputs)` says, as of `tokens`.
        grid: (rows, columns) of each picture's visual tokens, as of `tokens`.
        title: of the page.

    Raises:
        ValueError: no report, or reports of different inputs; `prompt` or `names` of another
            length; pictures that do not fit the visual tokens, as of `tokens`; more of them than
            fit into 2 MB.
        OSError: a picture cannot be read, or the file not be written.
    """
    reports = list(report) if isinstance(report, Sequence) else [report]
    _check_same(reports)
    words = _words(prompt, *reports[0].kept.visual.shape)
    if names is None:
        names = of_reports(reports)
    elif isinstance(names, str) or len(names) != len(reports):
        raise ValueError(f"names: expected {len(reports)}, one a report, got {shown(names)}")
    batch = len(reports[0].dense_tokens)
    looks = [_looks(_of_prompt(image, b), reports[0], b, grid, grids) for b in range(batch)]
    data = {
        "title": title,
        "layers": len(reports[0].tokens_per_layer),
        "first": max((layer for one in reports for layer in one.kept), default=0),
        "flops": reports[0].dense_flops_per_layer,
        "methods": [_method(*pair) for pair in zip(names, reports, strict=True)],
    }
    for side in SIDES:
        pictures = Pictures(side)
        data["prompts"] = [
            _prompt(reports[0], b, looks[b], words[b], pictures) for b in range(batch)
        ]
        data["images"] = pictures.sources
        text = _filled(data)
        if len(text.encode()) < MOST_BYTES:
            Path(path).write_text(text, encoding="utf-8")
            return
    raise ValueError(
        f"image: the pictures and frames of {batch} prompts do not fit into "
        f"{MOST_BYTES / 1e6:g} MB; write a page for some of them"
    )


def _filled(data: Mapping[str, Any]) -> str:
    template = resources.files("vtp_kernels.plot").joinpath("page.html").read_text("utf-8")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Within a script, "</script" and "<!--" are all that is not text.
    return template.replace("__DATA__", text.replace("<", "\\u003c"))


# --- what is asked for ----------------------------------------------------------------------------


def _check_same(reports: Sequence[Report]) -> None:
    if not reports:
        raise ValueError("report: expected at least one, got none")
    first = reports[0]
    for index, other in enumerate(reports[1:], 1):
        if (
            other.kept.visual.shape != first.kept.visual.shape
            or not torch.equal(other.kept.visual, first.kept.visual)
            or len(other.tokens_per_layer) != len(first.tokens_per_layer)
        ):
            raise ValueError(f"report: number {index + 1} is of other inputs, or another model")


def _words(prompt: Any, batch: int, width: int) -> list[Sequence[str] | None]:
    """The tokens of each prompt as strings, where they are known."""
    if prompt is None:
        return [None] * batch
    listed = [prompt] if batch == 1 and len(prompt) and isinstance(prompt[0], str) else list(prompt)
    if len(listed) != batch or any(isinstance(one, str) or len(one) != width for one in listed):
        raise ValueError(
            f"prompt: expected {width} strings, one a token of the input, for each of {batch} "
            f"prompts, got {[len(one) for one in listed]}"
        )
    return listed


def _of_prompt(image: Any, prompt: int) -> Any:
    if not isinstance(image, Mapping):
        return image
    if prompt not in image:
        raise ValueError(f"image: no pictures for prompt {prompt}, there are {sorted(image)}")
    return image[prompt]


class Numbered(dict[int, torch.Tensor]):
    """In place of what stayed before a layer: the number of each column."""

    def __init__(self, visual: torch.Tensor) -> None:
        super().__init__({0: torch.arange(visual.shape[1]).expand(visual.shape)})
        self.visual = visual


def _looks(image: Any, report: Report, prompt: int, grid: Any, grids: Any) -> list[Look | Film]:
    """Of a prompt: its pictures and videos, with columns where `looks_of` has what stayed."""
    visual = report.kept.visual
    if not visual[prompt].any():
        return []
    options = {"visual": None, "sample": prompt, "grid": grid, "grids": grids}
    return looks_of(image, Numbered(visual), **options)


# --- as JSON --------------------------------------------------------------------------------------


class Pictures:
    """JPEGs, each but once."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.sources: list[str] = []
        self._known: dict[tuple[int, int], int] = {}

    def number(self, picture: Image.Image, side: int) -> int:
        """The number of a picture, made so small that its longer side has `side` pixels."""
        key = id(picture), side
        if key not in self._known:
            small = picture if max(picture.size) <= side else fitted(picture, side)
            if max(small.size) < 224:  # the outline of a token needs some room
                small = fitted(picture, min(224, side), Image.NEAREST)
            held = io.BytesIO()
            small.convert("RGB").save(held, "JPEG", quality=QUALITY)
            self._known[key] = len(self.sources)
            self.sources.append(
                "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
            )
        return self._known[key]


def _prompt(
    report: Report,
    b: int,
    looks: list[Look | Film],
    words: Sequence[str] | None,
    pictures: Pictures,
) -> dict[str, Any]:
    depth = len(report.tokens_per_layer)
    held = report.kv_tokens_per_layer
    earlier = [held[layer][b] - report.tokens_per_layer[layer][b] for layer in range(depth)]
    dense = report.dense_tokens[b]
    told = list(_told(report, b, words))
    return {
        "name": f"{b + 1}" if words is None else f"{b + 1}: {_asked(told)}",
        "dense": [dense] * depth,
        "kv": [dense + max(before, 0) for before in earlier],
        "words": told,
        "pictures": [_picture(look, index, pictures) for index, look in enumerate(looks)],
    }


def _told(report: Report, b: int, words: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The prompt from left to right: a token of text by itself, visual ones together."""
    visual = report.kept.visual[b].tolist()
    column = len(visual) - report.dense_tokens[b]  # padding is on the left
    while column < len(visual):
        if visual[column]:
            end = column
            while end < len(visual) and visual[end]:
                end += 1
            yield {"columns": [column, end]}
            column = end
        else:
            text = f" {column}" if words is None else words[column]
            yield {"column": column, "text": text}
            column += 1


def _asked(told: list[dict[str, Any]]) -> str:
    """The text behind the last picture: what is asked about it, most often."""
    last = max((i for i, word in enumerate(told) if "columns" in word), default=-1)
    text = " ".join("".join(word["text"] for word in told[last + 1 :]).split())
    return text if len(text) <= TAB else text[: TAB - 1] + "\u2026"


def _picture(look: Look | Film, index: int, pictures: Pictures) -> dict[str, Any]:
    if isinstance(look, Film):
        side = math.ceil(FRAME * pictures.side)
        frames = [_look(frame, f"frame {frame.name}", pictures, side) for frame in look.frames]
        return {"name": look.name, "frames": frames}
    return _look(look, look.name or f"picture {index + 1}", pictures, pictures.side)


def _look(look: Look, name: str, pictures: Pictures, side: int) -> dict[str, Any]:
    return {
        "name": name,
        "image": pictures.number(look.picture, side),
        "box": list(look.box),
        "columns": look.stayed[0].tolist(),
    }


def _method(name: str, report: Report) -> dict[str, Any]:
    batch = len(report.dense_tokens)
    text_leaves = any("text_after" in event for event in report.events)
    return {
        "name": name,
        "flops": report.flops_per_layer,
        "textLeaves": text_leaves,
        "prompts": [
            {
                "tokens": [counts[b] for counts in report.tokens_per_layer],
                "kv": [counts[b] for counts in report.kv_tokens_per_layer],
                "left": _left(report, b),
                "scores": {
                    layer: [_number(x) for x in scores[b].tolist()]
                    for layer, scores in report.scores.items()
                },
            }
            for b in range(batch)
        ],
    }


def _number(score: float) -> float | str | None:
    """JSON has numbers that are finite, and no others."""
    if math.isnan(score):
        return None
    return float(f"{score:.4g}") if math.isfinite(score) else str(score).replace("inf", "Infinity")


def _left(report: Report, b: int) -> list[int | None]:
    """Of each column the first layer that it no longer enters; None if it stays."""
    left: list[int | None] = [None] * report.kept.visual.shape[1]
    for layer, kept in sorted(report.kept.items(), reverse=True):
        for column in (~kept[b]).nonzero()[:, 0].tolist():
            left[column] = layer
    return left
