"""Queries, keys and values of a Llama-like attention module, made outside of its forward."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["project", "rotate"]

# Some (Qwen3) normalise each head's queries and keys.
NORMS = {"q_proj": "q_norm", "k_proj": "k_norm"}


def project(attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """[B, H, S, D]: the queries ("q_proj"), keys or values of rows hidden [B, S, C]."""
    states = getattr(attention, name)(hidden)
    states = states.view(*states.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, NORMS[name], None) if name in NORMS else None
    return (states if norm is None else norm(states)).transpose(1, 2)


def rotate(attention: nn.Module, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Queries and keys with their rotary position embedding."""
    # The function that the layer itself uses stands beside it in its module.
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotary(query, key, cos, sin)
