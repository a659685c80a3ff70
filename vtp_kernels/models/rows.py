"""The prompt's rows at the entry of a layer, as a method sees them, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtp_kernels.ops import attention_scores, select_topk
from vtp_kernels.selection import Selection

from .observation import Observation

__all__ = ["Kept", "PromptRows"]


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
        self.past = past
        self._past_valid = past_valid
        self._observation = observation
        self._backend = backend

    def attention_scores(self, rows: slice, query_valid: Tensor | None = None) -> Tensor:
        """Attention that `rows` paid in the observed layer: float32 [B, S], 0 off visual tokens.

        Softmax over everything a row sees; mean over rows (those `query_valid` bool [B, M] allows)
        and over heads.
        """
        if self._observation is None:
            raise RuntimeError("no layer was observed: name it in the method's observed_layers")
        first, last, _ = rows.indices(self.hidden.shape[1])
        positions = None
        if last - first > 1 or last < self.hidden.shape[1]:
            positions = torch.arange(first, last, device=self.hidden.device) + self.past
            positions = positions.expand(self.hidden.shape[0], -1)
        scores = attention_scores(
            self._observation.queries(rows),
            self._observation.keys(self.past),
            candidates=self._behind_past(self.visual, False),
            valid=self._key_valid(),
            query_positions=positions,
            query_valid=query_valid,
            scale=self._observation.scale,
            backend=self._backend,
        )
        return scores[:, self.past :]

    def keep_visual(self, counts: list[int], scores: Tensor | None) -> Kept:
        """Keep all text, and of each prompt's visual tokens the `counts[b]` with highest scores.

        `scores` float32 [B, S]; None where no prompt has a choice to make (all or none stay).
        Counts must not exceed `visual_now`. Equal scores: the earlier token stays.
        """
        if scores is None:
            scores = torch.zeros(self.visual.shape, device=self.visual.device)
        capacity = max(map(sum, zip(self.text_now, counts, strict=True)))
        selection = select_topk(
            scores,
            self._on_device(counts),
            candidates=self.visual,
            keep=self.text,
            capacity=capacity,
            backend=self._backend,
        )
        return Kept(selection, self.text_now, counts)

    def _on_device(self, counts: list[int]) -> int | Tensor:
        if len(set(counts)) == 1:
            return counts[0]
        pinned = self.visual.device.type == "cuda"  # copied without waiting for the GPU
        tensor = torch.tensor(counts, dtype=torch.int32, pin_memory=pinned)
        return tensor.to(self.visual.device, non_blocking=True)

    def _key_valid(self) -> Tensor | None:
        if self._past_valid is None:
            return None if self.valid is None else self._behind_past(self.valid, True)
        now = torch.ones_like(self.visual) if self.valid is None else self.valid
        return torch.cat((self._past_valid, now), dim=1)

    def _behind_past(self, rows: Tensor, before: bool) -> Tensor:
        if self.past == 0:
            return rows
        return torch.cat((rows.new_full((rows.shape[0], self.past), before), rows), dim=1)
