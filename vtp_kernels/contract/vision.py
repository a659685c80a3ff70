"""What the vision tower saw of each picture, and each frame, as a method may ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels._shown import shown as shown_as
from vtp_kernels.ops import cls_inflection, inflection
from vtp_kernels.selection import Selection

from .counts import moved, on_device
from .groups import marked

__all__ = ["ASKS", "SCORES", "SOURCES", "Ask", "PromptVision", "Seen", "Shown", "asks_of"]

SOURCES = ("similarity", "attention")
"""By what pictures' curves are sorted, see `Ask`."""
SCORES = ("attention", "cls", "received")
"""A number for each token."""
ASKS = ("similarity", *SCORES, "keys", "hidden")
"""What a method may ask of the vision tower, see `Ask`."""


@dataclass(frozen=True)
class Ask:
    """Something that a method asks of the vision tower.

    A token that shows several patches has the mean of theirs.

    what : one of ASKS
        "similarity": features and summary, as of `Seen`; they are always there. "attention":
        float32 [I, N], what tokens get from CLS, or from all rows of the tower where there is no
        CLS. "cls": the same, of towers that have CLS alone. "received": what they get from all
        rows, CLS among them. Attention is the mean over heads, and over the rows that pay it, of
        those that see the token: in a window, those of the window. "keys": float32 [I, N, D], as
        the attention gets them, mean over heads. "hidden": [I, N, C], what the layer puts out; of
        the feature layer, the features.
    layer : int | float, optional
        Of the tower: an index, from the end if it is negative, or the share of the layers that have
        run by then: 0.5 of 24 is the twelfth. None: the one whose output the features are.
    setting : str
        Where the layer was set, for error messages.
    """

    what: str
    layer: int | float | None = None
    setting: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        where = self.setting or "layer"
        if self.what not in ASKS:
            raise ValueError(f"expected one of {ASKS} or None, got {shown_as(self.what)}")
        if self.layer is None:
            return
        if self.what == "similarity":
            raise ValueError(f"{where}: similarity is of the features, got {shown_as(self.layer)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | float):
            raise TypeError(
                f"{where}: a layer of the vision tower is an int or a share of them, got "
                f"{shown_as(self.layer)}"
            )
        if isinstance(self.layer, float) and not 0 < self.layer <= 1:
            raise ValueError(f"{where}: a share lies above 0.0, up to 1.0, got {self.layer}")

    def index(self, layers: int) -> int:
        """Which of so many layers it is, from 0; ValueError if there is no such layer."""
        if isinstance(self.layer, float):
            return max(int(self.layer * layers + 0.5), 1) - 1
        if not -layers <= self.layer < layers:
            where = self.setting or f"layer of {self.what!r}"
            raise ValueError(
                f"{where}: there is no layer {self.layer}, the vision tower has {layers} (0 to "
                f"{layers - 1})"
            )
        return self.layer % layers


def asks_of(source: Any) -> tuple[Ask, ...]:
    """What `Method.vision_source` answers, as asks: one, its name, several of these, or None.

    Raises TypeError or ValueError for anything else."""
    if source is None:
        return ()
    if isinstance(source, str | Ask):
        source = (source,)
    if not isinstance(source, Iterable):
        raise TypeError(f"expected one or several of {ASKS} or None, got {shown_as(source)}")
    return tuple(dict.fromkeys(ask if isinstance(ask, Ask) else Ask(ask) for ask in source))


class Seen(NamedTuple):
    """Of I pictures (or crops of pictures, or frames of videos) with N visual tokens each.

    features [I, N, C], summary [I, C]: what the feature layer of the tower put out for them, and
    for the picture as a whole. values: [I, N] or [I, N, D] of each `Ask`. shows: int64 [F], on the
    CPU, for every row that the model's text is to get, in order: which token it shows, counted over
    all pictures, or -1 for one that shows none of them, as `image_newline`. grids: rows and columns
    of each picture's tokens, which stand line by line; None where that is not known. here: bool [I,
    N], on the CPU, where pictures have fewer than N tokens.
    """

    features: Tensor
    summary: Tensor
    values: Mapping[Ask, Tensor]
    shows: Tensor
    grids: list[tuple[int, int]] | None = None
    here: Tensor | None = None

    @property
    def attention(self) -> Tensor | None:
        return self.values.get(Ask("attention"))


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
        self.asker = "vision"  # who is at fault where something cannot be
        self.shows: Any = -1
        self._spans: list[tuple[Tensor, list[slice]]] = []  # what each prompt shows, by modality
        self._bounds: dict[int, list[int]] = {}
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

    def values(self, ask: Ask | str) -> Tensor:
        """What was asked for, of each picture's tokens: [I, N] or [I, N, D]. Those that a picture
        does not have hold anything."""
        ask = ask if isinstance(ask, Ask) else Ask(ask)
        if ask == Ask("hidden"):
            return self.seen.features.detach()
        if ask not in self.seen.values:
            raise ValueError(
                f"{self.asker}: {ask} was not asked for, vision_source names {self._asked}"
            )
        return self.seen.values[ask]

    def of_rows(self, ask: Ask | str) -> Tensor:
        """The same of each visual row of the prompts, by the token that it shows: [B, S] or
        [B, S, D]. Of rows that show none, not a number or zeros."""
        values = self.values(ask).to(self.shows.device).flatten(0, 1)
        none = values.new_full(values[:1].shape, torch.nan if values.dim() == 1 else 0)
        return torch.cat((values, none))[self.shows]  # -1 is the last one

    def next_to(self, chosen: Tensor) -> Tensor:
        """bool [B, S]: visual rows whose token stands above, below, left or right of one that a row
        in `chosen` bool [B, S] of the same prompt shows. Crops are pictures of their own.

        Raises NotImplementedError where it is not known how a picture's tokens stand.
        """
        around = self._around()  # of token i, [4]
        tokens = len(around) - 1
        shown = chosen.new_zeros(len(chosen), tokens + 1)
        places = torch.where(chosen, self.shows, -1) % (tokens + 1)
        shown.scatter_(1, places, True)
        shown[:, -1] = False  # what shows nothing, and what is beyond the edge
        beside = shown.gather(1, around[self.shows].flatten(1)).view(*self.shows.shape, 4)
        return beside.any(-1)

    def _around(self) -> Tensor:
        """int64 [I * N + 1, 4]: the tokens around each, counted over all pictures; the last, which
        is none, where there is none."""
        if self.seen.grids is None:
            raise NotImplementedError(
                f"{self.asker}: how the tokens of these pictures stand in rows and columns is not "
                "known"
            )
        pictures, width = self.seen.features.shape[:2]
        none = pictures * width
        around = torch.full((none + 1, 4), none)
        for picture, (rows, columns) in enumerate(self.seen.grids):
            first = picture * width
            order = torch.arange(first, first + rows * columns).view(rows, columns)
            framed = pad(order, (1, 1, 1, 1), value=none)
            sides = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
            around[order.flatten()] = torch.stack([side.flatten() for side in sides], dim=1)
        return moved(around, self.shows.device)

    @property
    def _asked(self) -> str:
        return ", ".join(map(str, self.seen.values)) or "nothing"

    def rows_showing(self, selection: Selection) -> Tensor:
        """bool [B, S]: the visual rows that show one of the tokens chosen, or none of all."""
        chosen = marked(selection.indices, self.seen.features.shape[1])
        flat = pad(chosen.flatten(), (0, 1), value=True)
        return flat.to(self.shows.device)[self.shows]  # -1 is the last one

    def at_most(self, tokens: int) -> list[int]:
        """Rows that a prompt has left if no picture keeps more than so many tokens. Compiled code
        has to have asked before, in `Method.look_ahead`."""
        if tokens in self._bounds:
            return self._bounds[tokens]
        pictures, width = self.seen.features.shape[:2]
        bounds = []
        for prompt in range(len(self.shows)):
            shows = torch.cat([shows[spans[prompt]] for shows, spans in self._spans])
            real = shows[shows >= 0]
            per_picture = torch.bincount(real // width, minlength=pictures).clamp(max=tokens)
            bounds.append(int(per_picture.sum()) + len(shows) - len(real))
        self._bounds[tokens] = bounds
        return bounds


def _joined(seens: list[Seen]) -> Seen:
    """What was seen of pictures and of videos as one: all beside each other, with room for the
    tokens of the largest."""
    if len(seens) == 1:
        return seens[0]
    width = max(seen.features.shape[1] for seen in seens)

    def beside(part: Callable[[Seen], Tensor]) -> Tensor:
        parts = [part(seen) for seen in seens]
        flat = [x.dim() == 2 for x in parts]
        return torch.cat(
            [
                pad(x, (0, width - x.shape[1]) if two else (0, 0, 0, width - x.shape[1]))
                for x, two in zip(parts, flat, strict=True)
            ]
        )

    shows, first = [], 0
    for seen in seens:
        pictures, tokens = seen.features.shape[:2]
        at = (first + seen.shows // tokens) * width + seen.shows % tokens
        shows.append(torch.where(seen.shows < 0, -1, at))
        first += pictures
    here = beside(_here)
    grids = [seen.grids for seen in seens]
    return Seen(
        beside(lambda seen: seen.features),
        torch.cat([seen.summary for seen in seens]),
        {ask: beside(lambda seen, ask=ask: seen.values[ask]) for ask in seens[0].values},
        torch.cat(shows),
        None if None in grids else [grid for some in grids for grid in some],
        None if here.all() else here,
    )


def _here(seen: Seen) -> Tensor:
    full = torch.ones(seen.features.shape[:2], dtype=torch.bool)
    return full if seen.here is None else seen.here


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
