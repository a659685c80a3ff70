"""How many rows each request has in each stage, and what a step does to them. All on the host, but
for what the attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp_kernels.contract.counts import moved

from .settings import Settings

__all__ = ["Accounts", "Prompt", "Stage", "Step"]


class Prompt(NamedTuple):
    """length : its tokens. visual : int64 [N], the places of its visual ones, ascending.
    picture : int64 [N], which picture each of these is of. pictures : tokens of each."""

    length: int
    visual: np.ndarray
    picture: np.ndarray
    pictures: list[int]

    @classmethod
    def of(cls, ranges: Sequence[Sequence[tuple[int, int]]], length: int) -> Prompt:
        """`ranges` of each picture are the first and last places of its tokens. The last token of
        the prompt has to stay, for the answer is read off it: it counts as text."""
        places = [
            np.concatenate([np.arange(first, min(last, length - 2) + 1) for first, last in some])
            for some in ranges
        ]
        order = np.argsort([some[0][0] for some in ranges], kind="stable")
        places = [places[at] for at in order]
        counts = [len(some) for some in places]
        nothing = [np.zeros(0, dtype=np.int64)]
        visual = np.concatenate(places or nothing).astype(np.int64)
        return cls(length, visual, np.repeat(np.arange(len(counts)), counts), counts)


class Accounts:
    """Of all requests that a worker holds, by the slot that vLLM gave them."""

    def __init__(self, settings: Settings, slots: int, device: torch.device) -> None:
        self.settings, self.device = settings, device
        stages = len(settings.layers)
        self.gone = np.zeros((stages, slots), dtype=np.int32)
        self.gone_there = torch.zeros(stages, slots, dtype=torch.int32, device=device)
        self.unread = np.zeros(slots, dtype=np.int64)  # tokens of prompts that are read our way
        self.prompts: dict[str, tuple[int, Prompt]] = {}

    def add(self, name: str, slot: int, prompt: Prompt) -> None:
        left = np.array(self.settings.left(prompt.pictures), dtype=np.int32)
        gone = len(prompt.visual) - left
        self.gone[:, slot] = gone
        self.gone_there[:, slot].copy_(moved(torch.from_numpy(gone), self.device))
        self.unread[slot] = prompt.length if self.settings.changes(prompt.pictures) else 0
        self.prompts[name] = slot, prompt

    def remove(self, name: str) -> None:
        self.prompts.pop(name, None)

    def step(
        self,
        names: Sequence[str],
        slots: np.ndarray,
        slots_there: Tensor,
        computed: np.ndarray,
        lengths: np.ndarray,
    ) -> Step | None:
        """What a batch does: R requests, of each its slot, the tokens that were computed before,
        and how many more these are. None if some of them are not known: vLLM tries itself out."""
        if not self.prompts.keys() >= set(names):
            return None
        fresh = np.flatnonzero(computed < self.unread[slots])
        gone = self.gone[:, slots]
        prompts = [self.prompts[names[at]][1] for at in fresh]
        step = Step(lengths.astype(np.int64), fresh, prompts, gone, self.device)
        if (computed[fresh] > 0).any() or (lengths[fresh] < step.heads).any():
            raise RuntimeError("a prompt with images was cut up, and no choice would see all of it")
        there = self.gone_there[:, slots_there]
        step.stages = [
            Stage(there[at], torch.from_numpy(gone[at]), *step.starts(at))
            for at in range(len(gone))
        ]
        return step


@dataclass
class Stage:
    """What its layers' attention is told of a step's R requests.

    gone : int32 [R], rows that left for good, these included that leave in this very step
    starts : int32 [R + 1], where the rows of each begin, if some leave in this step; else None
    """

    gone: Tensor
    gone_host: Tensor
    starts: Tensor | None
    starts_host: Tensor | None
    _places: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def places(self, starts: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of each of the step's `count` rows, which request it is of and its place among that
        request's rows. `starts` [R + 1] are those of this stage, `lengths` [R] all its rows."""
        if self._places is None:
            sizes = starts.diff()
            numbers = torch.arange(len(sizes), device=starts.device)
            request = torch.repeat_interleave(numbers, sizes, output_size=count)
            place = torch.arange(count, device=starts.device)
            self._places = request, place + (lengths - sizes - starts[:-1])[request]
        return self._places


class Step:
    """The rows of one forward pass.

    Attributes
    ----------
    lengths : int64 [R], rows of each request as it begins
    fresh : int64 [F], the requests whose prompts are read in it, and read our way
    prompts : of these
    stages : what the attention is told
    """

    stages: list[Stage]

    def __init__(
        self,
        lengths: np.ndarray,
        fresh: np.ndarray,
        prompts: list[Prompt],
        gone: np.ndarray,
        device: torch.device,
    ) -> None:
        self.lengths, self.fresh, self.prompts, self.device = lengths, fresh, prompts, device
        self.heads = np.array([prompt.length for prompt in prompts], dtype=np.int64)
        self._gone = np.zeros_like(gone)  # in this step, by stage and request
        self._gone[:, fresh] = gone[:, fresh]

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    def gone_by(self, stage: int | None) -> np.ndarray:
        """[R]: rows that left in this step, once a stage has begun."""
        return np.zeros_like(self.lengths) if stage is None else self._gone[stage]

    def loses_at(self, stage: int) -> bool:
        """Whether rows leave in this step as a stage begins."""
        before = stage - 1 if stage else None
        return bool((self.gone_by(stage) != self.gone_by(before)).any())

    def begins(self, stage: int | None) -> np.ndarray:
        """int64 [R + 1]: where the rows of each request begin, once a stage has begun."""
        return np.concatenate(([0], np.cumsum(self.lengths - self.gone_by(stage))))

    def starts(self, stage: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The same for the attention, on the device and on the host."""
        if not self._gone[stage].any():
            return None, None
        starts = torch.from_numpy(self.begins(stage).astype(np.int32))
        return moved(starts, self.device), starts

    @cached_property
    def visual(self) -> Tensor:
        """bool [rows]: the visual tokens of the fresh requests."""
        found = np.zeros(self.rows, dtype=bool)
        begins = self.begins(None)[self.fresh]
        places = [b + prompt.visual for b, prompt in zip(begins, self.prompts, strict=True)]
        found[np.concatenate(places)] = True
        return moved(torch.from_numpy(found), self.device)

    def staying(self, before: int | None, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that no choice is made of, as they stand before a stage and in it: those of other
        requests, and what a request that was preempted had answered already."""
        old, new = self.begins(before), self.begins(stage)
        heads, stay = np.zeros_like(self.lengths), np.zeros_like(self.lengths)
        heads[self.fresh] = self.heads - self.gone_by(before)[self.fresh]
        stay[self.fresh] = self.heads - self.gone_by(stage)[self.fresh]
        sizes = np.diff(old) - heads
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return (
            np.repeat(old[:-1] + heads, sizes) + within,
            np.repeat(new[:-1] + stay, sizes) + within,
        )
