"""Watches the vision tower, for methods that prune by what it saw.

generate() runs the tower before it calls the model, a plain call does so inside of it. Either way
`get_image_features` is called, or `get_video_features`, so these are watched: what was seen is put
on the object they return, which generate() hands to the model, and into the call that is under way
in this thread. Nothing is kept here, so calls in different threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from vtp_kernels.contract.vision import Ask, Seen, asks_of

from ..modules.shadow import NamingShadow, StaysBehind

__all__ = ["SEEN", "VisionWatch", "seen_of"]

MODALITIES = ("image", "video")
SEEN = "vtp_seen"  # the attribute of what get_image_features returns


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
    source : as `Method.vision_source` gives it
        Attention is computed for the rows that pay it alone, beside the tower's own.
    backend : of `vtp_kernels.attention_scores`

    Raises what `Tower.check` raises.
    """

    def __init__(self, base: nn.Module, tower: Any, source: Any, backend: str | None) -> None:
        self.base, self.tower, self.backend = base, tower, backend
        self.asks = asks_of(source)
        for ask in self.asks:
            tower.check(ask)
        self.now = threading.local()
        self.hooks: list[Any] = []
        self.shadows: list[EncodingShadow] = []

    def attach(self) -> None:
        # Frames of some families come as pictures, and nothing else encodes videos there.
        videos = self.tower.videos and hasattr(self.base, "get_video_features")
        for modality in MODALITIES if videos else ("image",):
            self.shadows.append(EncodingShadow(self.base, modality, self))
            self.shadows[-1].put()
        layers = dict.fromkeys(self.tower.layers_of(x.modality) for x in self.shadows)
        if any(ask.what not in ("similarity", "hidden") for ask in self.asks):
            for attention in dict.fromkeys(x for some in layers for x in some.attentions):
                hook = attention.register_forward_pre_hook(self._look, with_kwargs=True)
                self.hooks.append(hook)
        if any(ask.what == "hidden" and ask.layer is not None for ask in self.asks):
            for block in dict.fromkeys(x for some in layers for x in some.blocks):
                self.hooks.append(block.register_forward_hook(self._look_behind))

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
        now.wanted = self._wanted(shadow.modality, given)
        now.given, now.looked = given, {}
        now.layers = self.tower.layers_of(shadow.modality)
        try:
            output = shadow.original(*args, **kwargs)
        finally:
            looked, wanted = now.looked, now.wanted
            now.given = now.looked = now.wanted = None
        if isinstance(output, ModelOutput):  # not a tuple that somebody asked for by themselves
            missing = [ask for asks in wanted.values() for ask in asks if ask not in looked]
            if missing:
                raise RuntimeError(f"{missing[0]}: the vision tower did not run that layer")
            seen = self.tower.read(shadow.modality, given, output, looked)
            setattr(output, SEEN, seen)
            if getattr(now, "call", None) is not None:
                now.call.seen[shadow.modality] = seen
        return output

    def _wanted(self, modality: str, given: dict[str, Any]) -> dict[nn.Module, list[Ask]]:
        """What is asked of each module of the tower."""
        wanted: dict[nn.Module, list[Ask]] = {}
        for ask in self.asks:
            module = self.tower.module_of(ask, modality, given)
            if module is not None:
                wanted.setdefault(module, []).append(ask)
        return wanted

    def _asked_of(self, module: nn.Module) -> list[Ask]:
        if self.idle:
            return []
        return (getattr(self.now, "wanted", None) or {}).get(module, [])

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before an attention of the tower runs."""
        for ask in self._asked_of(module):
            now = self.now
            arguments = {"hidden_states": args[0], **kwargs} if args else kwargs
            with torch.no_grad():
                now.looked[ask] = now.layers.looked_at(
                    ask.what, module, arguments, now.given, self.backend
                )

    def _look_behind(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind a layer of the tower."""
        for ask in self._asked_of(module):
            self.now.looked[ask] = self.now.layers.put_out(output).detach()
