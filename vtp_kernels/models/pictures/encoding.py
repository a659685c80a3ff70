"""How pictures are laid out, noted where they are encoded.

generate() encodes pictures and videos before it calls the model, which then gets their features
alone: how many frames a video has, or how large a picture is, is no longer among its arguments. So
it is put on the object that is handed on, by a shadow in front of the model's methods that encode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..families import ModelParts
from ..families.looks import outlined
from ..modules.shadow import NamingShadow

__all__ = ["LayoutNotes", "outlines_of"]

NOTED = "vtp_layout"  # the attribute of what get_image_features and get_video_features return


def outlines_of(arguments: Mapping[str, Any], modalities: Iterable[Any]) -> dict[str, Any]:
    """How the pictures and videos are laid out that a call brings, as pixels or encoded."""
    found = outlined(arguments, modalities)
    for kind, output in (arguments.get("mm_encoder_outputs") or {}).items():
        noted = dict(getattr(output, NOTED, {}))
        outline = noted.pop(kind, None)
        if outline is not None and kind in found:  # features are repeated with their prompts
            found[kind] = found[kind]._replace(shape=outline.shape)
        found = noted | found
    return found


class LayoutNotes:
    """The shadows in front of a model's `get_image_features` and `get_video_features`."""

    def __init__(self, parts: ModelParts) -> None:
        top, base = parts.top, parts.base
        self.shadows = [
            NotingShadow(owner, name, parts.page.modalities)
            for name in ("get_image_features", "get_video_features")
            for owner in [base if hasattr(base, name) else top]
            if hasattr(owner, name)
        ]

    def attach(self) -> None:
        for shadow in self.shadows:
            shadow.put()

    def detach(self) -> None:
        for shadow in self.shadows:
            shadow.remove()


class NotingShadow(NamingShadow):
    def __init__(self, module: nn.Module, name: str, modalities: Iterable[Any]) -> None:
        super().__init__(module, name)
        self.modalities = modalities

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        # Within a call of the model its own arguments tell.
        if isinstance(output, ModelOutput) and not torch.compiler.is_compiling():
            setattr(output, NOTED, outlined(self.by_name(args, kwargs), self.modalities))
        return output
