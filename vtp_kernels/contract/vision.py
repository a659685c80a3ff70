"""What the vision tower saw of each picture, and each frame, as a method may ask for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.ops import cls_inflection, inflection
from vtp_kernels.selection import Selection

from .counts import moved, on_device

__all__ = ["SOURCES", "PromptVision", "Seen", "Shown"]

SOURCES = ("similarity", "attention")
"""What a method may ask of the vision tower."""


class Seen(NamedTuple):
    """Of I pictures (or crops of pictures, or frames of videos) with N visual tokens each.

    features [I, N, C], summary [I, C]: what the feature layer of the tower put out for them, and
    for the picture as a whole. attention: float32 [I, N] that they got in that layer, or None where
    nobody asked. shows: int64 [F], on the CPU, for every row that the model's text is to get, in
    order: which token it shows, counted over all pictures, or -1 for one that shows none of them,
    as `image_newline`. here: bool [I, N], on the CPU, where pictures have fewer than N tokens.
    """

    features: Tensor
    summary: Tensor
    attention: Tensor | None
    shows: Tensor
    here: Tensor | None = None


class Shown(NamedTuple):
    """What was seen of the pictures of a batch of prompts, or of its videos, and where they stand.

    placeholders: bool [B, S], the rows that get their features. counts: how many each prompt has.
    """

    seen: Seen
    placeholders: Tensor
    counts: list[int]


class PromptVision:
    """What the vision tower saw, and which rows of a batch of prompts show it.

    Attributes
    ----------
    seen : Seen
        Of all pictures, then of all frames of videos.
    shows : int64 [B, S]
        For each visual row the token it shows, counted over all of them; -1 where it shows none.
    """

    def __init__(self, shown: list[Shown], backend: str | None) -> None:
        self.seen, self._backend = _joined([part.seen for part in shown]), backend
        self.shows: Any = -1
        self._spans: list[tuple[Tensor, list[slice]]] = []  # what each prompt shows, by modality
        first = 0
        for seen, rows, counts in shown:
            shows = self.seen.shows[first : first + len(seen.shows)]
            first += len(shows)
            starts = _starts(len(shows), counts)
            spans = [slice(at, at + count) for at, count in zip(starts, counts, strict=True)]
            self._spans.append((shows, spans))
            start = on_device(starts, rows.device)
            order = rows.cumsum(1) - 1 + (start if isinstance(start, int) else start[:, None])
            tokens = moved(shows, rows.device)[order.clamp(0, len(shows) - 1)]
            self.shows = torch.where(rows, tokens, self.shows)

    def inflection(self, source: str, **rule: Any) -> tuple[Selection, Tensor]:
        """Of each picture: its tokens up to the knee of their sorted scores, and the scores [I, N].

        `source` as of VisionWatch; `rule` as of `vtp_kernels.inflection`.
        """
        seen, scores = self.seen, self.seen.attention
        if source == "similarity":
            features, summary = seen.features.detach(), seen.summary.detach()
            selection, scores = cls_inflection(features, summary, **rule, backend=self._backend)
            if seen.here is None:
                return selection, scores
        if seen.here is not None:  # what is not a number is on no curve
            scores = scores.masked_fill(~moved(seen.here, scores.device), torch.nan)
        return inflection(scores, **rule, backend=self._backend), scores

    def rows_showing(self, selection: Selection) -> Tensor:
        """bool [B, S]: the visual rows that show one of the tokens chosen, or none of all."""
        pictures, tokens = self.seen.features.shape[:2]
        indices = selection.indices
        chosen = torch.zeros(pictures, tokens + 1, dtype=torch.bool, device=indices.device)
        chosen.scatter_(1, torch.where(indices < 0, tokens, indices), True)
        flat = pad(chosen[:, :tokens].reshape(-1), (0, 1), value=True)
        return flat.to(self.shows.device)[self.shows]  # -1 is the last one

    def at_most(self, tokens: int) -> list[int]:
        """Rows that a prompt has left if no picture keeps more than so many tokens."""
        pictures, width = self.seen.features.shape[:2]
        bounds = []
        for prompt in range(len(self.shows)):
            shows = torch.cat([shows[spans[prompt]] for shows, spans in self._spans])
            real = shows[shows >= 0]
            per_picture = torch.bincount(real // width, minlength=pictures).clamp(max=tokens)
            bounds.append(int(per_picture.sum()) + len(shows) - len(real))
        return bounds


def _joined(seens: list[Seen]) -> Seen:
    """What was seen of pictures and of videos as one: all beside each other, with room for the
    tokens of the largest."""
    if len(seens) == 1:
        return seens[0]
    width = max(seen.features.shape[1] for seen in seens)
    parts, first = [], 0
    for features, summary, attention, shows, here in seens:
        pictures, tokens = features.shape[:2]
        more = width - tokens
        at = (first + shows // tokens) * width + shows % tokens
        here = torch.ones(pictures, tokens, dtype=torch.bool) if here is None else here
        parts.append(
            Seen(
                pad(features, (0, 0, 0, more)),
                summary,
                None if attention is None else pad(attention, (0, more)),
                torch.where(shows < 0, -1, at),
                pad(here, (0, more)),
            )
        )
        first += pictures
    features, summary, attention, shows, here = zip(*parts, strict=True)
    return Seen(
        torch.cat(features),
        torch.cat(summary),
        None if attention[0] is None else torch.cat(attention),
        torch.cat(shows),
        None if all(x.all() for x in here) else torch.cat(here),
    )


def _starts(once: int, counts: list[int]) -> list[int]:
    """Where each prompt's tokens begin, among the `once` that all pictures have. generate() repeats
    each prompt, one copy after the other, and shows all of them the same."""
    total = sum(counts)
    if not once or not total or total % once:
        raise ValueError(
            f"input: {total} visual tokens for pictures of {once} tokens; every picture needs its "
            "tokens"
        )
    copies = total // once
    starts = [sum(counts[:b:copies]) for b in range(0, len(counts), copies)]
    return [start for start in starts for _ in range(copies)]
