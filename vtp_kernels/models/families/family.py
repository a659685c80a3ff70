"""What a page says of its family, and the parts of a model that everything else sees.

A page is one file of this folder: a subclass of `Family` with what is its own. What a page leaves
out is as in LLaVA-1.5: a `language_model` of Llama-like layers, visual tokens where the prompt has
the picture's placeholder, and positions that count rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..keys.positions import POSITIONS
from ..keys.reach import Blocks, LayerKind, layer_kinds
from ..modules.linear import linear_layers
from ..towers import Tower, tower_of
from .deepstack import Planes
from .looks import Given, Looks
from .tiny import Tiny

__all__ = ["Family", "Modality", "ModelParts", "any_of"]


class Modality:
    """Pictures or videos: what a call brings them in, and the token that stands for them.

    Both are visual tokens. Frames of InternVL come as pictures.
    """

    def __init__(self, name: str, *pixels: str) -> None:
        self.name, self.pixels = name, pixels

    def given(self, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
        """What a call brings of it as pixels, and encoded: None where it does not. generate()
        encodes pictures before it calls the model, a plain call does so inside it."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        pixels = (arguments[name] for name in self.pixels if arguments.get(name) is not None)
        return next(pixels, None), encoded.get(self.name)

    def comes_with(self, arguments: Mapping[str, Any]) -> bool:
        return any(x is not None for x in self.given(arguments))

    def rows(self, base: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """bool [B, S]: which rows of the input are placeholders of its token."""
        token = self._token(base.config)
        if arguments.get("input_ids") is not None:
            return arguments["input_ids"] == token
        # Given embeddings instead of ids, the placeholders are those that equal its embedding.
        embeddings = arguments["inputs_embeds"]
        placeholder = torch.full((), token, device=embeddings.device)
        # Through the module: its weight may be in pieces.
        return (embeddings == base.get_input_embeddings()(placeholder)).all(-1)

    def _token(self, config: Any) -> int:
        token = getattr(config, f"{self.name}_token_id", None)
        return getattr(config, f"{self.name}_token_index") if token is None else token


def any_of(placeholders: dict[str, Tensor]) -> Tensor:
    """bool [B, S]: which rows are placeholders of any modality."""
    first, *others = placeholders.values()
    for rows in others:
        first = first | rows
    return first


class Family:
    """A line of families: models that keep their parts in the same places."""

    name: ClassVar[str]
    """`model_type` of their configs."""
    architectures: ClassVar[tuple[str, ...]]
    """Class names of the models, or of one of their base classes."""
    text_models: ClassVar[tuple[str, ...]]
    """`model_type` of the text configs it is tested with. Others are as good where
    `check_text_model` finds nothing that differs."""
    example: ClassVar[str] = ""
    """A checkpoint on the Hugging Face hub, as people name it."""
    since: ClassVar[str] = "5.17"
    """The oldest transformers that it works with, as far as was tried."""
    leave_before: ClassVar[str] = "any layer"
    """Before which layers rows may leave, in words."""
    grid_positions: ClassVar[bool] = False
    """Whether a visual token's position is a time, a row and a column, so that an image takes fewer
    positions than it has tokens, and there is no telling where rows would close up to."""
    row_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the layers that tell something of each row: int [B, S]."""
    towers: ClassVar[tuple[type[Tower], ...]] = ()
    """What is known of its vision towers: one for each kind of vision model that it may have."""
    modalities: ClassVar[tuple[Modality, ...]] = (
        Modality("image", "pixel_values"),
        Modality("video", "pixel_values_videos"),
    )
    sees_ahead: ClassVar[bool] = False
    """Whether rows may see some that come after them, as `blocks` tells."""
    may_be_acausal: ClassVar[bool] = False
    """Whether its attention need not be causal by itself: masks say what rows see."""
    resampled: ClassVar[bool] = False
    """Whether each visual token asks the whole picture for what it holds: it has no place in it."""
    limits: ClassVar[tuple[str, ...]] = ()
    """What does not go, for `supported_models`."""

    @property
    def is_too_new(self) -> bool:
        """For the transformers that is installed."""
        return Version(transformers.__version__).release < Version(self.since).release

    @property
    def positions(self) -> tuple[str, ...]:
        """What the `positions` of `apply` may be."""
        return ("original",) if self.grid_positions else POSITIONS

    @property
    def tells_frames(self) -> bool:
        """Whether it is given videos whose frames can be told apart. Elsewhere they come as
        pictures, if at all."""
        return type(self).frames is not Family.frames

    # ---- where its parts are ------------------------------------------------------------------

    def base(self, model: nn.Module) -> nn.Module:
        """The model that puts image features between the text embeddings."""
        return model.model

    def text(self, base: nn.Module) -> nn.Module:
        """The decoder stack; its `rotary_emb` makes the position embeddings of all layers."""
        return base.language_model

    def tower(self, base: nn.Module) -> Tower | None:
        """What is known of a model's vision tower; None if too little for what methods ask."""
        return tower_of(self.towers, base)

    # ---- its visual tokens --------------------------------------------------------------------

    def has_images(self, arguments: dict[str, Any]) -> bool:
        """Whether the arguments of a call bring image features. Looks at no tensor's values."""
        return any(modality.comes_with(arguments) for modality in self.modalities)

    def visual_tokens(self, base: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """bool [B, S]: which rows of a call's input are visual tokens."""
        return any_of(self.placeholders(base, arguments))

    def placeholders(self, base: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The same by modality ("image", "video"), of those that a call brings."""
        return {
            modality.name: modality.rows(base, arguments)
            for modality in self.modalities
            if modality.comes_with(arguments)
        }

    def take_planes(self, arguments: dict[str, Any], first: int) -> Planes | None:
        """What the decoder stack would add to visual rows between its layers, taken out of the
        arguments of its forward, if some of it comes behind layer `first`, before which rows may
        leave."""
        return None

    def blocks(self, base: nn.Module, arguments: dict[str, Any]) -> Blocks | None:
        """Which rows of a call see each other, those after them included; None where each sees what
        is before it alone."""
        return None

    def looks(self, given: Given) -> list[Looks]:
        """What the visual tokens of each picture show, in the order of the pictures."""
        if self.resampled:
            raise NotImplementedError(
                f"each visual token of {self.name} asks the whole picture for what it holds, and "
                "has no place in it: there are no cells to show"
            )
        raise NotImplementedError(f"what the visual tokens of {self.name} show is not known")

    def frames(self, given: Given) -> list[Looks]:
        """The same of each frame of each video, in their order. Frames that the model merges are
        one."""
        raise NotImplementedError(f"what frames the visual tokens of {self.name} show is not known")

    def lengths(self, given: Given) -> list[int]:
        """How many visual tokens each picture has: what of `looks` the inputs of a call tell."""
        return [look.tokens for look in self.looks(given)]

    # ---- for tests ----------------------------------------------------------------------------

    def tiny(self) -> dict[str, Tiny]:
        """Small models with random weights, by name, and pictures for them: the kinds of model that
        differ in more than their size."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelParts:
    """The places of a model that the engine attaches to."""

    page: Family
    top: nn.Module
    """The model that users call; its forward knows `logits_to_keep` and `labels`."""
    base: nn.Module
    text: nn.Module
    kinds: tuple[LayerKind, ...]
    """Of the decoder layers."""
    linear: frozenset[int]
    """Decoder layers with linear attention: no keys, no weights."""

    @classmethod
    def of(cls, page: Family, model: nn.Module) -> ModelParts:
        base = page.base(model)
        text = page.text(base)
        return cls(page, model, base, text, layer_kinds(text), linear_layers(text))

    @property
    def family(self) -> str:
        return self.page.name

    @property
    def layers(self) -> nn.ModuleList:
        return self.text.layers

    @cached_property
    def attending(self) -> list[int]:
        """Layers that have attention."""
        return [layer for layer in range(len(self.layers)) if layer not in self.linear]

    @property
    def counted(self) -> int:
        """The layer by which the model counts what it was given: the first that has attention."""
        return self.attending[0]

    @cached_property
    def shortest_window(self) -> int | None:
        """Of the layers that have one."""
        windows = (kind.window for kind in self.kinds if kind.window is not None)
        return min(windows, default=None)

    @property
    def positions(self) -> tuple[str, ...]:
        return self.page.positions

    def has_images(self, arguments: dict[str, Any]) -> bool:
        return self.page.has_images(arguments)

    def visual_tokens(self, arguments: dict[str, Any]) -> Tensor:
        return self.page.visual_tokens(self.base, arguments)

    def placeholders(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        return self.page.placeholders(self.base, arguments)

    def blocks(self, arguments: dict[str, Any]) -> Blocks | None:
        return self.page.blocks(self.base, arguments)

    def rotary(self, kind: LayerKind, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for layers of a kind, of rows at these positions, int64 [B, S], which
        count rows."""
        if hasattr(self.text.rotary_emb, "mrope_section"):  # takes a time, a row and a column
            positions = positions.expand(3, -1, -1)
        named = () if kind.rotary is None else (kind.rotary,)
        return self.text.rotary_emb(hidden, positions, *named)
