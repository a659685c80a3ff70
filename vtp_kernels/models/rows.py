"""The prompt's rows at the entry of a layer, as a method sees them, and what it answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.ops import attention_scores, compact_rows, select_topk, token_contribution
from vtp_kernels.selection import Selection

from .masks import valid_keys
from .observation import Observation

__all__ = ["Kept", "PromptRows", "on_device"]


class Kept(NamedTuple):
    """The rows that stay, and how many of them each prompt has, known without asking the GPU."""

    selection: Selection
    text: list[int]
    visual: list[int]


class PromptRows:
    """The rows of a batch of prompts at the entry of a layer.

    B prompts of S rows each, padding included. Rows that have left are not among them.

    Attributes
    ----------
    hidden : float [B, S, C]
        What the layer is about to read.
    visual, text : bool [B, S]
        Which rows are visual tokens, and which are anything else but padding.
    valid : bool [B, S] or None
        False for padding; None if there is none.
    origin : int64 [B, S]
        Where each row stood in the input.
    visual_at_start, visual_now, text_now : list of int
        Rows per prompt when the prompt came in, and at this layer.
    visual_ordinal : int64 [B, S]
        For visual rows: the how-many-th visual token of the prompt it was, from 0.
    prompt_end : int
        Row of the last prompt token; rows after it are drafts of assisted decoding.
    columns : int
        Columns of the input, which `origin` counts.
    memory : dict
        For the method to note things from one decision of this call to the next.
    past : int
        Keys that came before these rows, in the layer that was observed.
    """

    def __init__(
        self,
        *,
        hidden: Tensor,
        visual: Tensor,
        valid: Tensor | None,
        origin: Tensor,
        visual_ordinal: Tensor,
        visual_at_start: list[int],
        visual_now: list[int],
        text_now: list[int],
        drafts: int,
        columns: int,
        memory: dict[str, Any],
        observation: Observation | None,
        past: int,
        past_valid: Tensor | None,
        backend: str | None,
    ) -> None:
        self.hidden = hidden
        self.visual = visual
        self.valid = valid
        self.text = ~visual if valid is None else valid & ~visual
        self.origin = origin
        self.visual_ordinal = visual_ordinal
        self.visual_at_start = visual_at_start
        self.visual_now = visual_now
        self.text_now = text_now
        self.prompt_end = hidden.shape[1] - 1 - drafts
        self.columns = columns
        self.memory = memory
        self.past = past
        self._past_valid = past_valid
        self._observation = observation
        self._backend = backend

    def attention_scores(self, rows: slice, query_valid: Tensor | None = None) -> Tensor:
        """Attention that `rows` paid in the observed layer: float32 [B, S], 0 off visual tokens.

        Softmax over everything a row sees; mean over rows (those `query_valid` bool [B, M] allows)
        and over heads.
        """
        observation = self._observed()
        first, last, _ = rows.indices(self.hidden.shape[1])
        positions = None
        if last - first > 1 or last < self.hidden.shape[1]:
            positions = torch.arange(first, last, device=self.hidden.device) + self.past
            positions = positions.expand(self.hidden.shape[0], -1)
        query = observation.queries(rows)
        scores = attention_scores(
            query,
            observation.keys(self.past),
            candidates=pad(self.visual, (self.past, 0)),
            valid=self._key_valid(),
            query_positions=positions,
            query_valid=query_valid,
            scale=observation.scale,
            backend=self._backend,
        )
        return observation.all_heads.mean(scores, query)[:, self.past :]

    def token_contribution(self) -> tuple[Tensor, Tensor]:
        """What the visual rows added to the observed layer's output for the last prompt token.

        (cosine, norm), float32 [B, S] each, as of the op of that name; 1 and 0 off visual tokens.
        """
        observation, end = self._observed(), self.prompt_end + 1
        keys = self.past + end  # drafts of assisted decoding come later
        valid = self._key_valid()
        query, key, value = observation.all_heads.gather(
            observation.queries(slice(end - 1, end))[:, :, 0],
            observation.keys(self.past)[:, :, :keys],
            observation.values(self.past)[:, :, :keys],
        )
        parts = token_contribution(
            query,
            key,
            value,
            candidates=pad(self.visual, (self.past, 0))[:, :keys],
            valid=None if valid is None else valid[:, :keys],
            scale=observation.scale,
            backend=self._backend,
        )
        after = self.hidden.shape[1] - end
        cosine, norm = (part[:, self.past :] for part in parts)
        return pad(cosine, (0, after), value=1.0), pad(norm, (0, after))

    def _observed(self) -> Observation:
        if self._observation is None:
            raise RuntimeError("no layer was observed: name it in the method's observed_layers")
        return self._observation

    def gather(self, mask: Tensor, counts: list[int]) -> tuple[Tensor, Selection, Tensor | None]:
        """`hidden` of the rows in `mask` bool [B, S] alone, in order, `counts[b]` of each prompt:
        [B, N, C]; which rows these are; and which of the N are there, bool [B, N] (None: all)."""
        selection = select_topk(
            torch.zeros(mask.shape, device=mask.device),
            0,
            keep=mask,
            capacity=max(counts),
            backend=self._backend,
        )
        (hidden,) = compact_rows((self.hidden,), *selection, backend=self._backend)
        valid = None
        if min(counts) < max(counts):
            valid = selection.indices >= 0
        return hidden, selection, valid

    def spread(self, values: Tensor, selection: Selection) -> Tensor:
        """Values [B, N] of selected rows, at the rows they are of: [B, S], 0 elsewhere."""
        length = self.hidden.shape[1]
        places = torch.where(selection.indices >= 0, selection.indices, length)
        return values.new_zeros(len(values), length + 1).scatter(1, places, values)[:, :-1]

    def in_columns(self, x: Tensor, fill: float) -> Tensor:
        """Values of rows [B, S] at the input columns they came from, [B, columns]; `fill` where no
        row is left. Padding must hold `fill` too."""
        out = x.new_full((x.shape[0], self.columns), fill)
        # Padding names column 0 as its origin: whatever stands there must win over it.
        real = x != fill
        columns = torch.where(real, self.origin, self.columns)
        return pad(out, (0, 1)).scatter(1, columns, x)[:, :-1]

    def keep_where(self, kept: Tensor, counts: list[int]) -> Kept:
        """Keep all text, and the visual tokens where `kept` bool [B, S]: `counts[b]` per prompt."""
        return self._kept(counts, None, k=0, keep=self.text | (self.visual & kept))

    def keep_visual(self, counts: list[int], scores: Tensor | None) -> Kept:
        """Keep all text, and of each prompt's visual tokens the `counts[b]` with highest scores.

        `scores` float32 [B, S]; None where no prompt has a choice to make (all or none stay).
        Counts must not exceed `visual_now`. Equal scores: the earlier token stays.
        """
        k = on_device(counts, self.visual.device)
        return self._kept(counts, scores, k=k, candidates=self.visual, keep=self.text)

    def _kept(self, counts: list[int], scores: Tensor | None, **choice: Any) -> Kept:
        """What select_topk chooses, where that is all text and `counts` visual tokens."""
        if scores is None:
            scores = torch.zeros(self.visual.shape, device=self.visual.device)
        capacity = max(map(sum, zip(self.text_now, counts, strict=True)))
        selection = select_topk(scores, capacity=capacity, backend=self._backend, **choice)
        return Kept(selection, self.text_now, counts)

    def _key_valid(self) -> Tensor | None:
        return valid_keys(self.past, self._past_valid, self.valid, self.visual)


def on_device(counts: list[int], device: torch.device) -> int | Tensor:
    """One number per prompt: as an int if they agree, else as int32 [B] on the device."""
    if len(set(counts)) == 1:
        return counts[0]
    pinned = device.type == "cuda"  # copied without waiting for the GPU
    tensor = torch.tensor(counts, dtype=torch.int32, pin_memory=pinned)
    return tensor.to(device, non_blocking=True)
