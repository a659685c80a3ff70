"""What the vision tower saw of each picture, for methods that prune by it.

generate() runs the tower before it calls the model, a plain call does so inside of it. Either way
`get_image_features` is called, so that is watched: what was seen is put on the object it returns,
which generate() hands to the model, and into the call that is under way in this thread. Nothing is
kept here, so calls in different threads do not meet.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from vtp_kernels.ops import attention_scores, cls_inflection, inflection
from vtp_kernels.selection import Selection

from .counts import moved, on_device
from .shadow import Shadow, StaysBehind

__all__ = ["SOURCES", "PromptVision", "Seen", "VisionWatch", "seen_of"]

SOURCES = ("similarity", "attention")
SEEN = "vtp_seen"  # the attribute of what get_image_features returns


class Seen(NamedTuple):
    """Of I pictures (or crops of pictures) with N visual tokens each.

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


def seen_of(arguments: dict[str, Any]) -> Seen | None:
    """What was noted on the encoded pictures that a call brings, if they came encoded.

    Raises NotImplementedError for videos: nobody looked at them.
    """
    encoded = arguments.get("mm_encoder_outputs") or {}
    if arguments.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise NotImplementedError(
            "pixel_values_videos: what the vision tower sees is judged picture by picture, and "
            "videos are not; use a method that does not ask for it"
        )
    return getattr(encoded.get("image"), SEEN, None)


class EncodingShadow(Shadow):
    """In front of a model's `get_image_features`: shows a watch what goes in and comes out."""

    def __init__(self, base: nn.Module, watch: VisionWatch) -> None:
        super().__init__(base, "get_image_features")
        self.watch = watch
        self.signature = inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        more = given.pop("kwargs", {})
        return self.watch.encode(self.original, given | more, args, kwargs)


class VisionWatch(StaysBehind):
    """Watches a model's `get_image_features` while a method is applied.

    Parameters
    ----------
    base : the model that has it
    tower : what is known of its vision tower, as `towers.tower_of` gives it
    source : "similarity" | "attention"
        Attention is computed for the scoring rows alone, beside the tower's own.
    backend : of `vtp_kernels.attention_scores`
    """

    def __init__(self, base: nn.Module, tower: Any, source: str, backend: str | None) -> None:
        self.base, self.tower, self.source, self.backend = base, tower, source, backend
        self.now = threading.local()
        self.hooks: list[Any] = []

    def attach(self) -> None:
        self.shadow = EncodingShadow(self.base, self)
        self.shadow.put()
        if self.source == "attention":
            for attention in self.tower.attentions:
                hook = attention.register_forward_pre_hook(self._look, with_kwargs=True)
                self.hooks.append(hook)

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.shadow.remove()

    def expect(self, call: Any) -> None:
        """What is seen in this thread from now on belongs to `call`, to its `seen`; None: to no
        call that has begun."""
        self.now.call = call

    def encode(self, original: Any, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        now = self.now
        now.scores = None
        now.scoring = self.tower.scoring(given) if self.source == "attention" else None
        try:
            output = original(*args, **kwargs)
        finally:
            scores, now.scores, now.scoring = now.scores, None, None
        if isinstance(output, ModelOutput):  # not a tuple that somebody asked for by themselves
            seen = self.tower.read(given, output, scores)
            setattr(output, SEEN, seen)
            if getattr(now, "call", None) is not None:
                now.call.seen = seen
        return output

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before an attention of the tower runs: what its tokens get from the scoring rows."""
        if self.idle:
            return
        now = self.now
        if getattr(now, "scoring", None) is not module:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = hidden[:, : self.tower.scoring_rows(hidden.shape[1])]
        with torch.no_grad():
            now.scores = attention_scores(
                self.tower.heads(module, "q_proj", rows),
                self.tower.heads(module, "k_proj", hidden),
                candidates=torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device),
                scale=module.scale,
                backend=self.backend,
            )


class PromptVision:
    """What the vision tower saw, and which rows of a batch of prompts show it.

    Attributes
    ----------
    seen : Seen
    shows : int64 [B, S]
        For each visual row the token it shows, counted over all pictures; -1 where it shows none.
    """

    def __init__(self, seen: Seen, placeholders: Tensor, counts: list[int], backend: str | None):
        """placeholders bool [B, S]: the rows that get image features, `counts` in each prompt."""
        self.seen, self._backend = seen, backend
        total, once = sum(counts), len(seen.shows)
        if once == 0 or total % once:
            raise ValueError(
                f"input: {total} visual tokens for pictures of {once} tokens; every picture needs "
                "its tokens"
            )
        # generate() repeats each prompt, one copy after the other, and shows all of them the same.
        copies = total // once
        self._starts = [sum(counts[:b:copies]) for b in range(0, len(counts), copies)]
        self._starts = [start for start in self._starts for _ in range(copies)]
        self._counts = counts
        device = placeholders.device
        shows = moved(seen.shows, device)
        start = on_device(self._starts, device)
        order = placeholders.cumsum(1) - 1 + (start if isinstance(start, int) else start[:, None])
        self.shows = torch.where(placeholders, shows[order.clamp(0, once - 1)], -1)

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
            # What is not a number is on no curve.
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
        for start, count in zip(self._starts, self._counts, strict=True):
            shows = self.seen.shows[start : start + count]
            real = shows[shows >= 0]
            per_picture = torch.bincount(real // width, minlength=pictures).clamp(max=tokens)
            bounds.append(int(per_picture.sum()) + count - len(real))
        return bounds
