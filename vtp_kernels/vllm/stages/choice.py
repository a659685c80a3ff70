"""Which rows of a step stay: the method's own decision, by this package's ops.

vLLM has the rows of a step one request behind the other. A method looks at a batch of prompts that
end together. So prompts are padded on the left, in batches of prompts of similar lengths: one long
prompt does not make short ones as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtp_kernels.contract.backends import Backends
from vtp_kernels.contract.counts import moved, on_host
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.contract.rows import Kept, PromptRows
from vtp_kernels.contract.unit import Unit
from vtp_kernels.models.attention.stand_ins import attend_passively
from vtp_kernels.models.passage.decision import decision

from .accounting import Prompt, Step
from .settings import Settings

__all__ = ["Choice", "Heads", "Rows", "Seen"]


class Heads(NamedTuple):
    """Of a layer's attention, on this rank.

    queries, keys : how many there are. size : elements of each. scale : factor on the logits.
    together : what makes known on all ranks what each knows of its own heads: `mean`, `gather` and
    `are_spread` as of `vtp_kernels.models.attention.ranks.AllHeads`.
    """

    queries: int
    keys: int
    size: int
    scale: float
    together: Any


class Seen(NamedTuple):
    """What a layer's attention was called with: [rows, heads * size] each, in positions; and its
    queries and keys before these were turned into them."""

    heads: Heads
    query: Tensor
    key: Tensor
    value: Tensor
    unrotated: tuple[Tensor, Tensor] | None = None


class Rows(NamedTuple):
    """The rows of a step that are there, one request behind the other.

    hidden : [rows, C], what the next layer is about to read
    visual : bool [rows], the visual tokens of fresh requests
    places : int64 [rows], where each stands in its prompt
    """

    hidden: Tensor
    visual: Tensor
    places: Tensor


class Choice:
    """The choices of one step, stage by stage."""

    def __init__(self, settings: Settings, step: Step, backends: Backends) -> None:
        self.settings, self.step = settings, step
        self.batches = [_Batch(step, some, settings.depth, backends) for some in _alike(step.heads)]

    def stays(self, stage: int, there: Rows, seen: Seen | None) -> Tensor | None:
        """int64 [rows that stay], ascending within each request: which of the rows before a stage
        go on; None: all. Nothing waits for the device but a method whose counts depend on what it
        sees. `seen`: of the layer before, if the method asks for it."""
        before, device = stage - 1 if stage else None, there.hidden.device
        found = [batch.decided(self.settings, stage, there, seen) for batch in self.batches]
        if not self.step.loses_at(stage):
            return None
        new = self.step.begins(stage)
        stays = torch.zeros(int(new[-1]) + 1, dtype=torch.int64, device=device)  # and a place for
        sources, places = map(torch.from_numpy, self.step.staying(before, stage))  # what leaves
        stays[moved(places, device)] = moved(sources, device)
        for batch, (index, kept) in zip(self.batches, found, strict=True):
            counts = batch.text_now + batch.visual_now
            if kept is None:
                chosen = torch.arange(index.shape[1], device=device).expand(len(index), -1)
                shift = index.shape[1] - counts
            else:
                chosen, shift = kept.selection.indices, np.zeros_like(counts)
            width = np.arange(chosen.shape[1])
            to = new[batch.requests, None] + width - shift[:, None]
            real = (width >= shift[:, None]) & (width < (shift + counts)[:, None])
            to = moved(torch.from_numpy(np.where(real, to, new[-1])), device)
            stays[to] = index.gather(1, chosen.clamp(min=0))
        return stays[:-1]

    def passive(
        self, stage: int | None, how: PassiveVisual, visual: Tensor, seen: Seen, output: Tensor
    ) -> Tensor:
        """What a layer's attention puts out, [rows, C], where visual tokens are passive in it:
        `output`, but for the rows of the prompts. `stage` is the one that has begun."""
        found = torch.cat((output, output.new_empty(1, output.shape[1])))  # the last for padding
        for batch in self.batches:
            index, valid = batch.index(stage)
            of_prompts, to = visual[index], index
            if valid is not None:
                of_prompts, to = of_prompts & valid, index.masked_fill(~valid, len(output))
            rows = _Observed(seen, index)
            states = rows.queries(slice(None)), rows.keys(0), rows.values(0)
            attended = attend_passively(how, *states, of_prompts, valid, rows.scale, None)
            found[to] = attended.transpose(1, 2).flatten(2)
        return found[:-1]


def _alike(lengths: np.ndarray) -> list[np.ndarray]:
    """The numbers of prompts in batches, in which none is twice as long as another."""
    kinds = np.frexp(lengths.astype(np.float64))[1]
    return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]


class _Batch:
    """B prompts that are looked at together, from stage to stage."""

    def __init__(self, step: Step, numbers: np.ndarray, depth: int, backends: Backends) -> None:
        self.step, self.depth, self.backends = step, depth, backends
        self.requests = step.fresh[numbers]
        self.prompts: list[Prompt] = [step.prompts[at] for at in numbers]
        self.lengths = step.heads[numbers]
        self.memory: dict[str, Any] = {}
        self.columns = int(self.lengths.max())
        visual = np.zeros((len(numbers), self.columns), dtype=bool)
        for row, prompt in zip(visual, self.prompts, strict=True):
            row[prompt.visual] = True
        self.visual = moved(torch.from_numpy(visual), step.device)
        self.visual_at_start = visual.sum(1)
        self.visual_now = self.visual_at_start
        self.text_now = self.lengths - self.visual_at_start
        self.units = _Pictures(self.prompts, self.columns)
        #: Layers with passive visual tokens ask again and again.
        self._index: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def index(self, stage: int | None) -> tuple[Tensor, Tensor | None]:
        """Where the prompts' rows are in the step once a stage has begun, int64 [B, S]; and which
        of these are no padding, bool [B, S], None if all."""
        if stage not in self._index:
            self._index[stage] = self._found(stage)
        return self._index[stage]

    def _found(self, stage: int | None) -> tuple[Tensor, Tensor | None]:
        counts = self.lengths - self.step.gone_by(stage)[self.requests]
        width = int(counts.max())
        place = np.arange(width) - (width - counts)[:, None]
        begins = self.step.begins(stage)[self.requests]
        index = torch.from_numpy(np.where(place < 0, 0, begins[:, None] + place))
        index = moved(index, self.step.device)
        if counts.min() == width:
            return index, None
        return index, moved(torch.from_numpy(place >= 0), self.step.device)

    def decided(
        self, settings: Settings, stage: int, there: Rows, seen: Seen | None
    ) -> tuple[Tensor, Kept | None]:
        """What the method decides before a stage, and which rows of the step, int64 [B, S], it
        decides it of."""
        index, valid = self.index(stage - 1 if stage else None)
        rows = self._rows(index, valid, there, seen)
        kept = decision(settings.method, settings.layers[stage], rows)
        if kept is not None:
            text, visual = np.array(on_host(kept.text)), np.array(on_host(kept.visual))
            self._check(settings, stage, text, visual, kept)
            self.text_now, self.visual_now = text, visual
        else:
            self._check(settings, stage, self.text_now, self.visual_now, None)
        if not settings.counted:
            gone = self.lengths - self.text_now - self.visual_now
            self.step.settle(stage, self.requests, gone)
        return index, kept

    def _check(
        self,
        settings: Settings,
        stage: int,
        text: np.ndarray,
        visual: np.ndarray,
        kept: Kept | None,
    ) -> None:
        """What the blocks were made for is what stays, or no less than that."""
        name, layer = type(settings.method).__name__, settings.layers[stage]
        if kept is not None and kept.hidden is not None:
            raise NotImplementedError(
                f"{name}.decide before layer {layer} merges rows (with_content), which vLLM's "
                "stages do not carry out"
            )
        promised = np.array([settings.most(prompt.pictures)[stage] for prompt in self.prompts])
        if settings.counted:
            broken = (visual != promised).any() or (text != self.text_now).any()
        else:
            broken = (visual > promised).any()
        if broken:
            raise RuntimeError(
                f"{name}.{'visual_left' if settings.counted else 'visual_most'} promised "
                f"{promised.tolist()} visual tokens and {self.text_now.tolist()} others before "
                f"layer {layer}, and decide left {visual.tolist()} and {text.tolist()}"
            )

    def _rows(
        self, index: Tensor, valid: Tensor | None, there: Rows, seen: Seen | None
    ) -> PromptRows:
        """The prompts' rows, as a method sees them."""
        visual, origin = there.visual[index], there.places[index]
        if valid is not None:
            visual, origin = visual & valid, origin.masked_fill(~valid, 0)
        return PromptRows(
            hidden=there.hidden[index],
            visual=visual,
            valid=valid,
            origin=origin,
            prompt_visual=self.visual,
            visual_at_start=self.visual_at_start.tolist(),
            visual_now=self.visual_now.tolist(),
            text_now=self.text_now.tolist(),
            text_before=[int(prompt.visual[0]) for prompt in self.prompts],
            drafts=0,
            columns=self.columns,
            depth=self.depth,
            memory=self.memory,
            observation=None if seen is None else _Observed(seen, index),
            past=0,
            key_valid=lambda: valid,
            sight=None,
            vision=None,
            units=self.units,
            backends=self.backends,
        )


class _Observed:
    """A layer's queries, keys and values of the rows in `index` [B, S], as a method may ask for
    them (`vtp_kernels.contract.seen.Observed`)."""

    def __init__(self, seen: Seen, index: Tensor) -> None:
        self.seen, self.index, self.scale = seen, index, seen.heads.scale

    def heads(self, query: Tensor) -> Any:
        return self.seen.heads.together

    def queries(self, rows: slice, rotary: bool = True) -> Tensor:
        """[B, Hq, M, D]"""
        query = self.seen.query if rotary else self.seen.unrotated[0]
        return self._of(query, self.seen.heads.queries, self.index[:, rows])

    def keys(self, past: int) -> Tensor:
        """[B, Hkv, S, D]"""
        return self._of(self.seen.key, self.seen.heads.keys, self.index)

    def values(self, past: int) -> Tensor:
        """[B, Hkv, S, D]"""
        return self._of(self.seen.value, self.seen.heads.keys, self.index)

    def unrotated_keys(self) -> Tensor:
        """[B, Hkv, S, D]"""
        return self._of(self.seen.unrotated[1], self.seen.heads.keys, self.index)

    def _of(self, states: Tensor, heads: int, index: Tensor) -> Tensor:
        states = states.view(len(states), heads, self.seen.heads.size)
        return states[index].transpose(1, 2)


class _Pictures:
    """Which picture each visual token is of (`vtp_kernels.contract.unit.Units`)."""

    videos = False

    def __init__(self, prompts: Sequence[Prompt], columns: int) -> None:
        self._prompts, self._columns = prompts, columns

    @property
    def all(self) -> list[list[Unit]]:
        return [
            [
                Unit(number, at, None, None, torch.from_numpy(prompt.visual[prompt.picture == at]))
                for at in range(len(prompt.pictures))
            ]
            for number, prompt in enumerate(self._prompts)
        ]

    def counts(self, visual: Tensor) -> list[list[int]]:
        return [prompt.pictures for prompt in self._prompts]

    def numbers(self, device: torch.device) -> Tensor:
        numbers = np.full((len(self._prompts), self._columns), -1)
        for row, prompt in zip(numbers, self._prompts, strict=True):
            row[prompt.visual] = prompt.picture
        return moved(torch.from_numpy(numbers), device)
