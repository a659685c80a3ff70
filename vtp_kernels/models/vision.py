"""What the vision tower saw of each picture, and each frame, for methods that prune by it.

generate() runs the tower before it calls the model, a plain call does so inside of it. Either way
`get_image_features` is called, or `get_video_features`, so these are watched: what was seen is put
on the object they return, which generate() hands to the model, and into the call that is under way
in this thread. Nothing is kept here, so calls in different threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from vtp_kernels.ops import cls_inflection, inflection
from vtp_kernels.selection import Selection

from .counts import moved, on_device
from .shadow import NamingShadow, StaysBehind

__all__ = ["SOURCES", "PromptVision", "Seen", "Shown", "VisionWatch", "seen_of"]

SOURCES = ("similarity", "attention")
MODALITIES = ("image", "video")
SEEN = "vtp_seen"  # the attribute of what get_image_features returns


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


def seen_of(arguments: dict[str, Any], modalities: Collection[str], tower: Any) -> dict[str, Seen]:
    """What was noted on what a call, which has these `modalities`, brings encoded: by modality,
    where anything was.

    Raises NotImplementedError for videos, where nobody looks at them.
    """
    if "video" in modalities and not tower.videos:
        raise NotImplementedError(
            "pixel_values_videos: what the vision tower sees of this family's videos is not known "
            "here; use a method that does not ask for it"
        )
    encoded = arguments.get("mm_encoder_outputs") or {}
    found = {name: getattr(encoded.get(name), SEEN, None) for name in modalities}
    return {name: seen for name, seen in found.items() if seen is not None}


class EncodingShadow(NamingShadow):
    """In front of a model's `get_image_features`, or what encodes another modality: shows a watch
    what goes in and comes out."""

    def __init__(self, base: nn.Module, modality: str, watch: VisionWatch) -> None:
        super().__init__(base, f"get_{modality}_features")
        self.modality, self.watch = modality, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch.encode(self, self.by_name(args, kwargs), args, kwargs)


class VisionWatch(StaysBehind):
    """Watches a model encode pictures and videos while a method is applied.

    Parameters
    ----------
    base : the model that has it
    tower : what is known of its vision tower, as `Family.tower` gives it
    source : "similarity" | "attention"
        Attention is computed for the scoring rows alone, beside the tower's own.
    backend : of `vtp_kernels.attention_scores`
    """

    def __init__(self, base: nn.Module, tower: Any, source: str, backend: str | None) -> None:
        self.base, self.tower, self.source, self.backend = base, tower, source, backend
        self.now = threading.local()
        self.hooks: list[Any] = []
        self.shadows: list[EncodingShadow] = []

    def attach(self) -> None:
        # Frames of some families come as pictures, and nothing else encodes videos there.
        videos = self.tower.videos and hasattr(self.base, "get_video_features")
        for modality in MODALITIES if videos else ("image",):
            self.shadows.append(EncodingShadow(self.base, modality, self))
            self.shadows[-1].put()
        if self.source == "attention":
            for attention in self.tower.attentions:
                hook = attention.register_forward_pre_hook(self._look, with_kwargs=True)
                self.hooks.append(hook)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for shadow in self.shadows:
            shadow.remove()
        self.shadows.clear()

    def expect(self, call: Any) -> None:
        """What is seen in this thread from now on belongs to `call`, to its `seen`; None: to no
        call that has begun."""
        self.now.call = call

    def encode(self, shadow: EncodingShadow, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        now = self.now
        if getattr(now, "given", None) is not None:
            return shadow.original(*args, **kwargs)  # some encode videos by way of pictures
        now.scoring = self.tower.scoring(given) if self.source == "attention" else None
        now.given, now.scores = given, None
        try:
            output = shadow.original(*args, **kwargs)
        finally:
            scores, now.given, now.scores, now.scoring = now.scores, None, None, None
        if isinstance(output, ModelOutput):  # not a tuple that somebody asked for by themselves
            seen = self.tower.read(shadow.modality, given, output, scores)
            setattr(output, SEEN, seen)
            if getattr(now, "call", None) is not None:
                now.call.seen[shadow.modality] = seen
        return output

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before an attention of the tower runs: what its tokens get from the scoring rows."""
        if self.idle:
            return
        now = self.now
        if getattr(now, "scoring", None) is not module:
            return
        arguments = {"hidden_states": args[0], **kwargs} if args else kwargs
        with torch.no_grad():
            now.scores = self.tower.layers.received(module, arguments, now.given, self.backend)


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
