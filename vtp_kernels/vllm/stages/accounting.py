"""How many rows each request has in each stage, and what a step does to them. All on the host, but
for what the attention reads.

Where a method's counts depend on the picture, they are upper bounds until it has decided."""

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
        self._expect(slot, prompt)
        self.unread[slot] = prompt.length if self.settings.changes(prompt.pictures) else 0
        self.prompts[name] = slot, prompt

    def _expect(self, slot: int, prompt: Prompt) -> None:
        """What will be gone of a prompt that is not read yet; at least, if that is not counted."""
        most = np.array(self.settings.most(prompt.pictures), dtype=np.int32)
        self.note(np.array([slot]), 0, (len(prompt.visual) - most)[:, None])

    def note(self, slots: np.ndarray, first: int, gone: np.ndarray) -> None:
        """`gone` int32 [stages, R] rows of some requests, from stage `first` on."""
        self.gone[first:, slots] = gone
        there, slots = (moved(torch.from_numpy(x), self.device) for x in (gone, slots))
        self.gone_there[first:, slots.long()] = there

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
        prompts = [self.prompts[names[at]][1] for at in fresh]
        if (
            not self.settings.counted
        ):  # what is known of one that was preempted is of its first time
            for at, prompt in zip(fresh, prompts, strict=True):
                self._expect(slots[at], prompt)
        step = Step(self, slots, slots_there, lengths.astype(np.int64), fresh, prompts)
        if (computed[fresh] > 0).any() or (lengths[fresh] < step.heads).any():
            raise RuntimeError("a prompt with images was cut up, and no choice would see all of it")
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
    stages : what the attention is told, of each stage
    """

    def __init__(
        self,
        accounts: Accounts,
        slots: np.ndarray,
        slots_there: Tensor,
        lengths: np.ndarray,
        fresh: np.ndarray,
        prompts: list[Prompt],
    ) -> None:
        self.accounts, self.slots, self.slots_there = accounts, slots, slots_there
        self.lengths, self.fresh, self.prompts = lengths, fresh, prompts
        self.device = accounts.device
        self.heads = np.array([prompt.length for prompt in prompts], dtype=np.int64)
        gone = accounts.gone[:, slots]
        self._gone = np.zeros_like(gone)  # in this step, by stage and request
        self._gone[:, fresh] = gone[:, fresh]
        self.stages = [self._stage(at) for at in range(len(gone))]

    def _stage(self, stage: int) -> Stage:
        gone = torch.from_numpy(self.accounts.gone[stage, self.slots])
        return Stage(self.accounts.gone_there[stage, self.slots_there], gone, *self.starts(stage))

    def settle(self, stage: int, requests: np.ndarray, gone: np.ndarray) -> None:
        """A method has decided that `gone` int64 [R] rows of some fresh requests are not in a
        stage; later ones have no more."""
        known = np.maximum(self._gone[stage:, requests], gone).astype(np.int32)
        self._gone[stage:, requests] = known
        self.accounts.note(self.slots[requests], stage, known)
        self.stages[stage] = self._stage(stage)

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
    def places(self) -> Tensor:
        """int64 [rows]: where each row is among those of its request. For a prompt that is read
        in this step, its place in that."""
        begins = self.begins(None)
        places = np.arange(self.rows) - np.repeat(begins[:-1], self.lengths)
        return moved(torch.from_numpy(places), self.device)

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
