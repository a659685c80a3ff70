"""What cannot be done while rows leave, refused before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vtp_kernels.contract.checks import check_layers
from vtp_kernels.contract.method import Method
from vtp_kernels.ops import _checks

from ..attention.projections import has_these_steps, refuse_sinks, takes_positions
from ..families import ModelParts
from ..keys.cache import check_cache, is_static
from ..keys.masks import mask_of, takes_keys_by_mask, tells_by_mask
from ..keys.reach import PASSIVE, refuse_window
from ..modules.linear import words_for
from ..modules.placement import why_gone
from .asked import takes_logits_to_keep

__all__ = [
    "check_further_turn",
    "check_method",
    "check_padding",
    "check_placement",
    "check_prefill",
    "check_windows",
]


def check_method(parts: ModelParts, method: Method, positions: str) -> None:
    """Raise for methods and positions that a model's family cannot have."""
    family, name = parts.family, type(method).__name__
    depth = len(parts.layers)
    method.check_model(depth)
    check_layers(method, depth)
    method.check_config(family, parts.text.config)
    if positions not in parts.positions:
        raise NotImplementedError(
            f"{family} cannot run {name} with positions={positions!r}: its visual tokens have rows "
            "and columns for positions, which do not close up; use 'original'"
        )
    _check_attention(parts, method)
    observed, passive = method.observed_layers(depth), method.passive_layers(depth).items()
    _check_sight(parts, method)
    for layer in sorted({*observed, *method.passive_layers(depth)}):
        refuse_sinks(parts.layers[layer].self_attn, f"{family} cannot run {method}")
    check_placement(parts, method, observed)
    for layer in sorted({*observed, *(i for i, how in passive if not how.leaves_one)}):
        attention = parts.layers[layer].self_attn
        if not has_these_steps(attention):
            raise NotImplementedError(
                f"model: {name} computes anew what layer {layer} attended to, and somebody put a "
                f"{type(attention).__name__} in the place of its attention; take it out, or use a "
                "method that leaves this layer alone"
            )


def _check_attention(parts: ModelParts, method: Method) -> None:
    """Raise where a method wants something of a layer's attention, and the layer has none."""
    depth, attending = len(parts.layers), parts.attending
    for what, layers in (
        ("has visual tokens passive in the attention of", method.passive_layers(depth)),
        ("lets visual tokens leave the KV cache of", method.forgetful_layers(depth)),
        ("looks at the attention of", method.observed_layers(depth)),
    ):
        linear = sorted(parts.linear.intersection(layers))
        if linear:
            behind = [layer + 1 for layer in attending if layer + 1 < depth]
            raise ValueError(
                f"{parts.family} cannot run {method}: it {what} layer {linear[0]}, which has "
                "linear attention or a convolution: no weights and no keys, but one state for all "
                f"rows. Layers {words_for(attending)} have attention; a method that goes by it "
                f"decides before layers {words_for(behind)}"
            )


def _check_sight(parts: ModelParts, method: Method) -> None:
    """Raise where a method wants something of layers in which rows do not see all before them."""
    depth, family = len(parts.layers), parts.family
    passive = method.passive_layers(depth)
    if parts.page.sees_ahead and passive:
        raise NotImplementedError(
            f"{family} cannot run {method}: its visual tokens see each other, those behind them "
            "included, and layers with passive visual tokens let rows see what is before them alone"
        )
    for layer in passive:
        refuse_window(parts.layers[layer].self_attn, PASSIVE)
    for layer in method.acausal_layers(depth):
        what = f"{type(method).__name__} asks what rows would see there of others after them"
        refuse_window(parts.layers[layer].self_attn, what)


def check_placement(parts: ModelParts, method: Method, observed: Iterable[int]) -> None:
    """Raise where the weights by which a method looks at a layer are not there when it does."""
    for layer in observed:
        reason = why_gone(parts.layers[layer])
        if reason is not None:
            raise NotImplementedError(
                f"model: {type(method).__name__} computes what layer {layer} attended to once the "
                f"layer has run, and its weights are gone by then: {reason}"
            )


def check_windows(parts: ModelParts, columns: int) -> None:
    """Raise NotImplementedError where attention would cut a window by the rows that are left, since
    no mask tells it which they are. `columns` is how many rows it has to do with, those that left
    included."""
    window, config = parts.shortest_window, parts.text.config
    if window is not None and columns > window and not tells_by_mask(config):
        raise NotImplementedError(
            f"the attention implementation {config._attn_implementation!r} counts the rows of a "
            f"sliding window ({window}) itself, and would go wrong about those that left: "
            f"prompt and answer have {columns} rows; use 'sdpa', or keep both within the window"
        )


def check_prefill(
    parts: ModelParts, arguments: dict[str, Any], cache: Any, past: int, columns: int
) -> None:
    """Raise for calls with images whose results would be wrong or have no meaning. `columns` is how
    many rows the model was given up to the end of this call."""
    if arguments.get("labels") is not None:
        raise ValueError(
            "labels: rows that left have no logits, so labels do not line up with the output; call "
            "the model without labels"
        )
    output_attentions = arguments.get("output_attentions")
    if output_attentions is None:
        output_attentions = parts.text.config.output_attentions
    if output_attentions:
        raise ValueError(
            "output_attentions: layers have different numbers of rows once some have left, and "
            "the attentions would not say of which tokens they speak; switch it off"
        )
    if arguments.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "cu_seq_lens_q: packed sequences are not supported: prompts that share a row of the "
            "batch would be taken for one; pass a left-padded batch"
        )
    if cache is not None:
        check_cache(cache, parts.kinds)
    attention = parts.layers[parts.counted].self_attn
    if takes_positions(attention) and takes_keys_by_mask(parts.text.config):
        raise NotImplementedError(
            f"model: FlashAttention is not supported with {type(attention).__name__}, which tells "
            "it the positions of rows: those between which others left look like packed sequences "
            "to it; load the model with attn_implementation='sdpa'"
        )
    if is_static(cache) and parts.text.config._attn_implementation == "flex_attention":
        raise NotImplementedError(
            "past_key_values: a StaticCache with the attention implementation 'flex_attention' is "
            "not supported: transformers makes it masks that go by how full the cache is when they "
            "are read, not when they are made; use a DynamicCache, or 'sdpa'"
        )
    if past and is_static(cache):
        raise NotImplementedError(
            "past_key_values: a StaticCache that already holds keys cannot take further images "
            "while pruning: the mask that comes with it is made for the first layer, and does not "
            "tell the keys of others apart; use a DynamicCache for conversations with several "
            "images"
        )
    mask = mask_of(arguments)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and not is_static(cache):
        raise NotImplementedError(
            "attention_mask: a 4D mask cannot be carried over to fewer rows; pass the 2D padding "
            "mask [B, S]"
        )
    _refuse_unseen_drafts(parts.top)
    planned = _generation_config()
    if getattr(planned, "prefill_chunk_size", None) is not None:
        raise ValueError(
            "prefill_chunk_size: pruning looks at the whole prompt at once, and would "
            "take the end of the first chunk for the end of the prompt; leave it out"
        )
    check_windows(parts, max(columns, getattr(planned, "max_length", None) or 0))


def check_further_turn(parts: ModelParts, past: int, prompts: int, padded: bool) -> None:
    """Raise where padding would come behind what linear attention has taken in."""
    if parts.linear and past and (prompts > 1 or padded):
        raise NotImplementedError(
            f"past_key_values: {parts.family} has layers with a state, and padding that comes "
            "behind something would go into it. So a call with images that goes on "
            f"from a cache may have one prompt, without padding; got {prompts}"
            f"{' with padding' if padded else ''}. Go on with each prompt by itself, without beams"
        )


def check_padding(padding: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Raise ValueError where a call counts in padding that has left a pruned cache: bool [B, C] and
    the call's mask bool [B, >= C]. On a GPU it is only read under `vtp.debug(True)`."""
    if padding is None:
        return
    if mask is None:
        raise ValueError(
            "attention_mask: the prompts in past_key_values had padding between them, so every "
            "call that goes on from there needs the mask [B, S] over all rows; got None"
        )
    if _checks.may_read(mask) and bool((mask[:, : padding.shape[1]] & padding).any()):
        raise ValueError(
            "attention_mask: it counts in rows that were padding when the prompt was read; pruned "
            "layers no longer have them. Leave them out, as in the mask of the prompt"
        )


def _generation_config() -> Any:
    """That of the generate() whose prompt this call is, None where it is not.

    generate(prefill_chunk_size=...) hands each chunk over as if it were a prompt of its own, and
    the method would take the last token of the first chunk for the prompt's last. Nothing in a
    chunk's arguments tells it apart.
    """
    return _caller("_prefill").get("generation_config")


def _refuse_unseen_drafts(top: nn.Module) -> None:
    """Drafts of assisted decoding are rows behind the prompt: models that are asked for their
    logits say by that how many there are, and others do not."""
    if not takes_logits_to_keep(type(top)) and _caller("_assisted_decoding"):
        raise NotImplementedError(
            f"assistant_model, prompt_lookup_num_tokens: drafts come with the prompt, and the "
            f"forward of {type(top).__name__} is not told how many, for it knows no "
            "logits_to_keep; generate without them"
        )


def _caller(name: str) -> dict[str, Any]:
    """The variables of the function of generate() that made this call: its frame is a few steps up
    from the hook. Empty where it is another."""
    if torch.compiler.is_compiling():
        return {}
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and "generation_config" in frame.f_locals:
            return frame.f_locals
        frame = frame.f_back
    return {}
