"""What a Llama-like attention module does in its forward, step by step and outside of it."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "NORMS",
    "attend",
    "has_these_steps",
    "is_rotated",
    "project",
    "rotate",
    "takes_positions",
]

# Some (Qwen3) normalise each head's queries and keys.
NORMS = {"q_proj": "q_norm", "k_proj": "k_norm"}


def has_these_steps(attention: nn.Module) -> bool:
    """Whether these are the steps of a module: one around it, of an adapter, has others."""
    return hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")


def project(attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """[B, H, S, D]: the queries ("q_proj"), keys or values of rows hidden [B, S, C]."""
    states = getattr(attention, name)(hidden)
    states = states.view(*states.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, NORMS[name], None) if name in NORMS else None
    return (states if norm is None else norm(states)).transpose(1, 2)


def rotate(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys with their rotary position embedding. `positions` [B, S] or [1, S], those of
    the queries, are for an attention that `takes_positions`; others may get None."""
    # The functions that the layer itself uses stand beside it in its module.
    beside = sys.modules[type(attention).__module__]
    if is_rotated(attention):
        query, key = beside.apply_rotary_pos_emb(query, key, cos, sin)
    if takes_positions(attention):
        rope = attention.config.rope_parameters
        beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        scale = beside.get_llama_4_attn_scale(positions, beta, length)
        query = query * scale.to(query.dtype)
    return query, key


def takes_positions(attention: nn.Module) -> bool:
    """Whether an attention (Ministral 3) makes queries longer the later they come, and so is to be
    told their positions."""
    return hasattr(sys.modules[type(attention).__module__], "get_llama_4_attn_scale")


def is_rotated(attention: nn.Module) -> bool:
    """Whether a layer has positions: those of Cohere 2 and EXAONE 4 that see all rows have none, if
    the others see a window."""
    names = {cls.__name__ for cls in type(attention).__mro__}
    if "Cohere2Attention" in names:
        return attention.sliding_window is not None
    if "Exaone4Attention" in names:
        return attention.sliding_window is None or attention.is_sliding
    return True


def attend(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Tensor:
    """What the module attends to, by its own implementation of attention: [B, S, H * D], before
    the output projection. `given` are the other arguments of its forward."""
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    kind = attention.config._attn_implementation
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)
    scale = attention.scaling
    output, _ = implementation(attention, query, key, value, mask, scaling=scale, **given)
    return output.flatten(2)
