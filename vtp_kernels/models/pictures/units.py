"""Pictures and frames of a call: which of them each visual token belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.contract.counts import moved
from vtp_kernels.contract.unit import Unit

from ..families import ModelParts
from ..families.looks import Given, Looks
from ..families.placing import placed
from .encoding import outlines_of

__all__ = ["Units"]


class Units:
    """Nothing is computed, and nothing read from the GPU, until somebody asks."""

    def __init__(
        self, parts: ModelParts, arguments: Mapping[str, Any], placeholders: Mapping[str, Tensor]
    ) -> None:
        """`arguments` are those of the model's forward; placeholders bool [B, S] for "image" and
        "video", as `ModelParts.placeholders` gives them. Of pixels and features only their shapes
        are remembered, and the model is not kept."""
        self._page, self._base = parts.page, weakref.ref(parts.base)
        self._placeholders = placeholders
        self._outlines = outlines_of(arguments, parts.page.modalities)
        self._visual: Tensor | None = None
        self._counts: list[list[int]] | None = None
        self._numbers: Tensor | None = None

    @property
    def videos(self) -> bool:
        """Whether there are any."""
        return "video" in self._placeholders

    @cached_property
    def all(self) -> list[list[Unit]]:
        """Those of each prompt, in the order in which they stand in it.

        Raises NotImplementedError where the family, or the call, does not tell, and where the model
        is gone.
        """
        page, base = self._page, self._base()
        if base is None:
            raise NotImplementedError("the model is gone that tells whose its visual tokens are")
        here = {kind: rows.cpu() for kind, rows in self._placeholders.items()}
        given = Given(base, page.tower(base), self._outlines, here)
        found: list[list[Unit]] = [[] for _ in next(iter(here.values()))]
        if "image" in here:
            numbers = [0] * len(found)
            for _, prompt, columns in placed(page.lengths(given), here["image"], copied=True):
                found[prompt].append(Unit(prompt, numbers[prompt], None, None, columns))
                numbers[prompt] += 1
        if "video" in here:
            for unit in _frames(page.frames(given), here["video"]):
                found[unit.prompt].append(unit)
        return [sorted(units, key=lambda unit: int(unit.columns[0])) for units in found]

    def visual_rows(self, visual: Tensor) -> Tensor:
        """The prompts' own visual rows bool [B, S], on the CPU. A row whose logits are asked for is
        none of them. The first to ask reads these."""
        if self._visual is None:
            self._visual = visual.cpu()
        return self._visual

    def counts(self, visual: Tensor) -> list[list[int]]:
        """How many of them each unit of each prompt has."""
        if self._counts is None:
            rows = self.visual_rows(visual)
            self._counts = [
                [int(rows[unit.prompt, unit.columns].sum()) for unit in units] for units in self.all
            ]
        return self._counts

    @cached_property
    def columns(self) -> Tensor:
        """int64 [B, S], on the CPU: the number of each column's unit among those of its prompt; -1
        where there is none."""
        numbers = torch.full(next(iter(self._placeholders.values())).shape, -1)
        for prompt, units in enumerate(self.all):
            for number, unit in enumerate(units):
                numbers[prompt, unit.columns] = number
        return numbers

    @cached_property
    def between_frames(self) -> Tensor:
        """bool [B, S], on the CPU: columns that stand between frames of videos and show none, as
        timestamps do; and as many before the first frame and behind the last. What stands between
        two videos is among them."""
        shows = torch.stack([rows.cpu() for rows in self._placeholders.values()]).any(0)
        between = torch.zeros_like(shows)
        for row, stays in zip(self._placeholders["video"].cpu(), between, strict=True):
            columns = row.nonzero()[:, 0]
            gaps = columns.diff() - 1
            gaps = gaps[gaps > 0]
            if not len(gaps):
                continue
            around = int(gaps[gaps <= 2 * gaps.min()].max())  # longer ones are between two videos
            first, last = int(columns[0]) - around, int(columns[-1]) + around
            stays[max(first, 0) : last + 1] = True
        return between & ~shows

    def numbers(self, device: torch.device) -> Tensor:
        """`columns` on a device."""
        if self._numbers is None:
            self._numbers = moved(self.columns, device)
        return self._numbers

    def pad(self, rows: int) -> None:
        """Put so many columns that are of no unit in front of `numbers`, or take them off."""
        if self._numbers is not None:
            self._numbers = pad(self._numbers, (rows, 0), value=-1)


def _frames(looks: Sequence[Looks], rows: Tensor) -> list[Unit]:
    units = []
    numbers: dict[int, dict[int, int]] = {}  # by prompt, and video of the batch
    for index, prompt, columns in placed([x.tokens for x in looks], rows, "frames", copied=True):
        of_prompt = numbers.setdefault(prompt, {})
        number = of_prompt.setdefault(looks[index].video, len(of_prompt))
        views = looks[index].views  # none where some tokens are left out, several with crops
        grid = columns[views[0].tokens] if len(views) == 1 else None
        units.append(Unit(prompt, None, number, looks[index].frames, columns, grid))
    return units
