"""The layers of a vision model, by kind: what one of them makes of its tokens.

A kind is a subclass of Layers that says where queries and keys are, how they are rotated, and who
attends to whom. It reads the arguments of an attention that is about to run and computes scores
beside it, so any implementation of attention will do. How the tokens become visual tokens of a
language model is not its concern: see `tower.Tower`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtp_kernels.ops import attention_scores

__all__ = ["Layers", "Place", "scale_of"]


class Place(NamedTuple):
    """Where a vision model keeps its attentions, as dotted paths, and what these must have."""

    blocks: str
    attention: str
    projections: tuple[str, ...]
    """Of queries and of keys, or the one that makes both."""


class Layers:
    """CLIP, SigLIP: pictures of one size, with CLS in front or without.

    Attributes
    ----------
    attentions, blocks : list of nn.Module
        One a layer; none where the model is not built as it is known here. A block is all of it.
    prefix : int
        Rows in front that are no patches: CLS comes first, registers follow.
    """

    #: `model_type` of the vision models.
    models: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model")
    #: Where their attentions may be.
    places: tuple[Place, ...] = (Place("encoder.layers", "self_attn", ("q_proj", "k_proj")),)
    #: What has to stand beside an attention's class in its module.
    functions: tuple[str, ...] = ()
    #: Whether it is known here how queries and keys are normalised, where they are.
    normed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.projections: tuple[str, ...] = ()
        self.blocks: list[nn.Module] = []
        self.attentions = self._find()
        self.prefix = self._prefix()

    @property
    def has_cls(self) -> bool:
        return self.prefix > 0

    def _find(self) -> list[nn.Module]:
        for place in self.places:
            blocks = list(_descend(self.model, place.blocks) or ())
            attentions = [_descend(block, place.attention) for block in blocks]
            if attentions and all(_has(a, place.projections) for a in attentions):
                first, self.projections, self.blocks = attentions[0], place.projections, blocks
                known = self.normed or not hasattr(first, "q_norm")
                return attentions if known and _has(_module_of(first), self.functions) else []
        return []

    def function(self, name: str) -> Any:
        """One that the attention's own module has: what the model itself calls."""
        return getattr(_module_of(self.attentions[0]), name)

    def _prefix(self) -> int:
        return int(hasattr(self.model.embeddings, "class_embedding"))

    def looked_at(
        self,
        what: str,
        attention: nn.Module,
        arguments: Mapping[str, Any],
        given: Mapping[str, Any],
        backend: str | None,
    ) -> Tensor:
        """What a method asks of an attention that is about to run: see `Ask`. [I, M] or [I, M, D]
        of M rows of the tower, or with rows packed [R] or [R, D].

        `arguments` are those of the attention's forward, `given` those of the call that encodes
        the pictures, by name.
        """
        from_cls = self.has_cls and what != "received"
        query, key = self.heads(attention, arguments, from_cls)
        if what == "keys":
            return key.float().mean(1)
        return self.received(attention, query, key, from_cls, arguments, given, backend)

    def received(
        self,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        from_cls: bool,
        arguments: Mapping[str, Any],
        given: Mapping[str, Any],
        backend: str | None,
    ) -> Tensor:
        """float32 [I, M]: what each row gets from the rows that pay, mean over these and over
        heads."""
        valid = self.valid(arguments, given)
        everywhere = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
        return attention_scores(
            query,
            key,
            candidates=everywhere if valid is None else valid,
            valid=valid,
            query_valid=None if from_cls else valid,
            scale=scale_of(attention),
            backend=backend,
        )

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries of the rows that pay, CLS or all, and keys of all: [I, H, 1 or M, D] and
        [I, H, M, D]."""
        hidden = arguments["hidden_states"]
        query, key = self.projections
        rows = hidden[:, :1] if from_cls else hidden
        return self.project(attention, query, rows), self.project(attention, key, hidden)

    def put_out(self, output: Any) -> Tensor:
        """[I, M, C], or with rows packed [R, C]: what a block put out."""
        return output[0] if isinstance(output, tuple) else output

    def project(self, attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
        """[I, H, M, D] of rows hidden [I, M, C]."""
        states = getattr(attention, name)(hidden)
        size = getattr(attention, "head_dim", None) or attention.attention_head_size
        return states.view(*states.shape[:2], -1, size).transpose(1, 2)

    def valid(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Tensor | None:
        """bool [I, M]: which rows are no padding; None where there is none."""
        return None


def scale_of(attention: nn.Module) -> float:
    """The factor on an attention's logits."""
    return attention.scaling if hasattr(attention, "scaling") else attention.scale


def _descend(module: Any, path: str) -> Any:
    """What is at a dotted path; None where the path breaks off."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _module_of(attention: nn.Module) -> Any:
    return sys.modules[type(attention).__module__]


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(hasattr(module, name) for name in names)
