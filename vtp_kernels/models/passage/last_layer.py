"""The last layer, whose output is read at few rows: those whose logits are asked for.

Of all others only keys and values are needed, for those to attend to and for the cache. So these
alone are computed, and the layer runs on the rows asked for, as in a step of decoding. Only in a
model that is as transformers makes it, which nobody looks into: any other may do with all rows what
it does not do with few.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.modules import module as torch_module
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from ..attention.projections import project, rotate
from ..families import ModelParts
from ..keys.cache import PrunedCache
from ..modules.onlookers import is_watched
from ..modules.placement import is_moved
from ..modules.shadow import Shadow

__all__ = ["asks_few_rows", "may_give_few_rows", "put_keys"]

# What transformers' layers are made of besides its own modules; each looks at rows one by one.
ROW_BY_ROW = (nn.Linear, nn.SiLU, nn.GELU, nn.Identity)
# Layers whose attention gets what comes in, without a norm before it.
NO_NORM_BEFORE = ("Exaone4DecoderLayer",)
CACHED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
# Kinds of attention whose masks are known, see masks.py.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def asks_few_rows(parts: ModelParts, arguments: dict[str, Any]) -> bool:
    """Whether a call reads the last layer's output at its last rows alone. `arguments` are those of
    the model's forward."""
    logits_to_keep = arguments.get("logits_to_keep", 0)
    if not isinstance(logits_to_keep, int) or logits_to_keep < 1:
        return False
    hidden_states = arguments.get("output_hidden_states")
    if hidden_states is None:
        configs = (parts.top.config, parts.base.config, parts.text.config)
        hidden_states = any(config.output_hidden_states for config in configs)
    return not hidden_states


def may_give_few_rows(parts: ModelParts, cache: Any) -> bool:
    """Whether its keys can be had before the last layer runs, and nobody would miss its rows."""
    if not isinstance(cache, PrunedCache) or cache.plain_class() is not DynamicCache:
        return False
    if cache.offloading or any(type(layer) not in CACHED for layer in cache.layers):
        return False
    if parts.text.config._attn_implementation not in ATTENTIONS:
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    layer = parts.layers[-1]
    if not (hasattr(layer, "self_attn") and hasattr(parts.text, "norm")):
        return False
    around = (parts.top, parts.base, parts.text, parts.text.norm)  # they hand on what it gives out
    return (
        all(map(_is_as_made, around))
        and all(_is_as_made(module) and _is_row_by_row(module) for module in layer.modules())
        and (hasattr(layer, "input_layernorm") or type(layer).__name__ in NO_NORM_BEFORE)
        and (getattr(layer.self_attn, "is_causal", False) or parts.page.may_be_acausal)
    )


def _is_as_made(module: nn.Module) -> bool:
    """Whether a module is transformers' or torch's own, and nobody changed it or looks into it."""
    kind = type(module)
    own = kind.__module__.startswith("transformers.models.") or kind in ROW_BY_ROW
    own = own or kind.__module__ == "transformers.activations"
    unchanged = kind.forward.__module__.startswith(("transformers.", "torch.nn.modules."))
    return own and unchanged and not is_watched(module)


def _is_row_by_row(module: nn.Module) -> bool:
    """The same of what a module within the layer has: plain weights, where they are used, and no
    function that somebody put there."""
    if module.training or is_moved(module):
        return False
    for weight in module._parameters.values():
        if weight is not None and not (type(weight) is nn.Parameter and weight.is_floating_point()):
            return False
    functions = [x for x in vars(module).values() if callable(x) and not isinstance(x, Shadow)]
    return all(getattr(x, "func", None) is gelu for x in functions)  # as in Gemma's MLP


def put_keys(
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cache: Any,
) -> None:
    """Put the keys and values of rows `hidden` [B, N, C] at the entry of a layer into the cache."""
    attention = layer.self_attn
    norm = getattr(layer, "input_layernorm", None)
    states = hidden if norm is None else norm(hidden)
    key = project(attention, "k_proj", states)
    key = rotate(attention, key[:, :1], key, cos, sin, positions)[1]
    cache.update(key, project(attention, "v_proj", states), attention.layer_idx)
