"""Whether an attention takes the steps by which the engine computes its queries and keys anew.

It runs once on a few rows, with a cache and an attention function that note what they are given.
What they got must be what projections.py makes of the same rows: then scores are those of the
model, whatever implementation of attention it runs with.
"""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.projections import (
    NORMS,
    has_sinks,
    is_gated,
    out_name,
    project_all,
    put_out,
    rotate,
    takes_positions,
)
from .weightless import Copies, Projection, Weighed

__all__ = ["HANDED_ON", "AttentionCheck", "Differs", "NotingCache", "demand", "with_attention"]

# Of the largest number. Float32 rounds by 1e-6 of it; a norm, a rotation or a scale that is missing
# or stands elsewhere changes random numbers by 1e-2 and more.
TOLERANCE = 1e-4
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NEEDED = (*PROJECTIONS, "head_dim", "scaling", "layer_idx")
BESIDE = ("apply_rotary_pos_emb", "eager_attention_forward")
# What a decoder layer and its attention may be given: what the engine makes for the rows that are
# left, and what is no matter of rows.
HANDED_ON = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "past_key_values",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}
# What an attention may tell its function besides: it changes nothing, or the mask says it too.
TOLD = HANDED_ON | {"dropout", "is_causal", "sliding_window"}
NOTING = "vtp_kernels_noting"


class Differs(Exception):
    """A model does something else than the engine relies on: what."""


def demand(fact: Any, otherwise: str) -> None:
    if not fact:
        raise Differs(otherwise)


class Noted(NamedTuple):
    """What an attention told its attention function, and got."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scale: float | None
    more: dict[str, Any]
    output: Tensor


class Cached(NamedTuple):
    key: Tensor
    value: Tensor
    layer: int


class NotingCache(DynamicCache):
    """An empty cache that tells what was last put into it."""

    got: Cached | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.got = Cached(key, value, layer_idx)
        return key, value


def _note(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """An attention function. What it puts out is as good as any."""
    batch, heads, rows, _ = query.shape
    numbers = batch * rows * heads * value.shape[-1]
    output = torch.arange(1.0, 1 + numbers, device="cpu").sin().view(batch, rows, heads, -1)
    vars(module)["noted"] = Noted(query, key, value, attention_mask, scaling, more, output)
    return output, None


AttentionInterface.register(NOTING, _note)


class AttentionCheck:
    """Of all attentions of one text model, one after the other. Raises `Differs`."""

    def __init__(
        self, copies: Copies, cache: NotingCache, positions: Tensor, may_be_acausal: bool
    ) -> None:
        self.copies, self.cache, self.positions = copies, cache, positions
        self.may_be_acausal = may_be_acausal
        self.projections: dict[tuple[str, int], nn.Module] = {}  # made once: layers are many
        self.plain_when_eager: set[type] = set()

    def run(self, layer: int, attention: nn.Module, given: dict[str, Any]) -> None:
        """`given` are the arguments that layer number `layer` calls its attention with."""
        here = f"layer {layer}"
        self._check_parts(here, attention)
        trial = self._without_weights(attention)
        self.cache.got = vars(trial)["noted"] = None
        given = given | {"position_ids": self._positions(attention)}
        output, *_ = type(trial).forward(trial, **given)
        noted, cached = vars(trial)["noted"], self.cache.got
        demand(noted is not None, f"the attention of {here} calls no attention function")
        demand(
            cached is not None and cached.layer == trial.layer_idx == layer,
            f"{here} does not put its keys into its place in the KV cache",
        )
        gate = self._compare_rows(here, trial, given, noted, cached)
        demand(
            noted.key is cached.key and noted.value is cached.value,
            f"{here} attends to other keys than it puts into the KV cache",
        )
        self._compare_function(here, trial, noted)
        difference = _difference(put_out(trial, noted.output.flatten(2), gate), output)
        demand(
            difference <= TOLERANCE,
            f"{here} does more than {out_name(attention)} to what its attention puts out: that "
            f"differs by {difference:.2g} of its size{_besides(trial)}",
        )

    def _positions(self, attention: nn.Module) -> Tensor | None:
        """What the engine hands on. So far apart that each has a scale of its own."""
        if not takes_positions(attention):
            return None
        return self.positions * attention.config.rope_parameters["original_max_position_embeddings"]

    def _check_parts(self, here: str, attention: nn.Module) -> None:
        beside = sys.modules[type(attention).__module__]
        needed = (*NEEDED, out_name(attention))
        missing = [name for name in needed if not hasattr(attention, name)]
        missing += [name for name in BESIDE if not hasattr(beside, name)]
        demand(
            not missing,
            f"{here} has an attention of class {type(attention).__name__} with no "
            f"{missing[0] if missing else ''}",
        )
        demand(
            getattr(beside, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS,
            f"the attention of {here} has attention functions of its own",
        )
        for name in itertools.chain(*NORMS.values()):
            weight = getattr(getattr(attention, name, None), "weight", None)
            demand(
                weight is None or weight.shape[-1] == attention.head_dim,
                f"{name} of {here} is not for heads of {attention.head_dim} numbers",
            )

    def _without_weights(self, attention: nn.Module) -> nn.Module:
        names = (*PROJECTIONS, out_name(attention))
        trial = self.copies.of(attention, attention._modules.keys() - names)
        trial.config = config = with_attention(attention.config, NOTING)
        for name in names:
            of_keys = name in ("k_proj", "v_proj")
            heads = config.num_key_value_heads if of_keys else config.num_attention_heads
            width = heads * attention.head_dim
            key = name, 2 * width if name == "q_proj" and is_gated(attention) else width
            if key not in self.projections:
                kind = Projection if name in PROJECTIONS else Weighed
                self.projections[key] = kind(key[1], self.copies.random)
            trial._modules[name] = self.projections[key]
        return trial

    def _compare_rows(
        self, here: str, trial: nn.Module, given: dict[str, Any], noted: Noted, cached: Cached
    ) -> Tensor | None:
        """The gate of what is attended to."""
        *plain, gate = project_all(trial, given["hidden_states"])
        positions = given["position_ids"]
        query, key = rotate(trial, *plain[:2], *given["position_embeddings"], positions)
        ours, theirs = (query, key, plain[2]), (noted.query, cached.key, cached.value)
        for i, what in enumerate(("queries", "keys", "values")):
            difference = _difference(ours[i], theirs[i])
            if not difference <= TOLERANCE:  # nor where it is not a number
                unrotated = _difference(plain[i], theirs[i]) <= TOLERANCE
                why = ", for it does not rotate them" if unrotated else _besides(trial)
                raise Differs(
                    f"the {what} of {here} as recomputed differ from those it attends with by "
                    f"{difference:.2g} of their size{why}"
                )
        return gate

    def _compare_function(self, here: str, trial: nn.Module, noted: Noted) -> None:
        demand(
            noted.scale == trial.scaling,
            f"{here} attends with a scale of {noted.scale}, and its scaling is {trial.scaling}",
        )
        causal = noted.more.get("is_causal", True), getattr(trial, "is_causal", True)
        demand(self.may_be_acausal or False not in causal, f"the attention of {here} is not causal")
        sinks = trial.sinks if has_sinks(trial) else None
        told = {name: x for name, x in noted.more.items() if x is not None}
        known = TOLD if sinks is None or told.get("s_aux") is not sinks else {*TOLD, "s_aux"}
        more = sorted(told.keys() - known)
        demand(not more, f"the attention of {here} uses {', '.join(more)}")
        if type(trial) not in self.plain_when_eager:
            query, key, value, mask, scale = noted[:5]
            eager = sys.modules[type(trial).__module__].eager_attention_forward
            output, _ = eager(trial, query, key, value, mask, scaling=scale)
            difference = _difference(_attended(query, key, value, mask, scale, sinks), output)
            demand(
                difference <= TOLERANCE,
                f"the eager attention of {here} is more than a softmax over its keys: it differs "
                f"by {difference:.2g} of its size",
            )
            self.plain_when_eager.add(type(trial))


def with_attention(config: Any, implementation: str) -> Any:
    """A copy of a text model's config, with another implementation of attention."""
    config = copy.copy(config)
    # Not by the property, which changes configs within this one, too: those are shared.
    config._attn_implementation_internal = implementation
    vars(config).update(output_attentions=False, output_hidden_states=False)
    return config


def _besides(attention: nn.Module) -> str:
    """What may be the reason."""
    known = {*PROJECTIONS, out_name(attention), *itertools.chain(*NORMS.values())}
    more = [name for name in attention._modules if name not in known]
    return f" (it has {', '.join(more)})" if more else ""


def _attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """[1, S, H, D]: attention under a mask by the book, with a sink [H] for each head, if any."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scale
    closed = ~mask if mask.dtype == torch.bool else mask != 0
    logits = logits.masked_fill(closed, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[:, None, None].expand_as(logits[..., :1])), -1)
    return (logits.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, as a share of the largest number; infinity between tensors of other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())
