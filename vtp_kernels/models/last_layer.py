"""The last layer, whose output is read at few rows: those whose logits are asked for.

Of all others only keys and values are needed, for those to attend to and for the cache. So these
alone are computed, and the layer runs on the rows asked for, as in a step of decoding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .asked import Asked
from .cache import is_static, put_away
from .families import ModelParts
from .onlookers import is_watched
from .placement import is_moved
from .projections import project, rotate

# Where modules come from that look at each row by itself.
PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "peft.")

__all__ = ["asks_few_rows", "may_give_few_rows", "put_keys"]


def asks_few_rows(parts: ModelParts, arguments: dict[str, Any], asked: Asked) -> bool:
    """Whether a call reads the last layer's output at its last rows alone. `arguments` are those of
    the model's forward."""
    if asked.all or asked.by_index:
        return False
    hidden_states = arguments.get("output_hidden_states")
    if hidden_states is None:
        configs = (parts.top.config, parts.text.config)
        hidden_states = any(config.output_hidden_states for config in configs)
    return not hidden_states


def may_give_few_rows(parts: ModelParts, cache: Any) -> bool:
    """Whether its keys can be had before the last layer runs, and nobody else sees its rows."""
    if cache is None or is_static(cache) or put_away(cache):
        return False
    layer = parts.layers[-1]
    if layer.training or is_moved(layer):
        return False
    within = list(layer.modules())
    behind = (parts.text.norm, parts.text, parts.base)  # these give out what the layer does
    return all(map(_is_plain, within)) and not any(map(is_watched, (*within, *behind)))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is known to do with each row by itself what it does with many. (Others may
    round all rows by one scale.)"""
    weights = module._parameters.values()
    return type(module).__module__.startswith(PLAIN) and all(
        x is None or (type(x) is nn.Parameter and x.is_floating_point()) for x in weights
    )


def put_keys(layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> None:
    """Put the keys and values of rows `hidden` [B, N, C] at the entry of a layer into the cache."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    key = project(attention, "k_proj", states)
    key = rotate(attention, key[:, :1], key, cos, sin)[1]
    cache.update(key, project(attention, "v_proj", states), attention.layer_idx)
