"""What one layer's attention saw, kept until the next layer decides which rows stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..keys.cache import attended, put_away
from .projections import project, rotate, takes_positions
from .ranks import AllHeads, all_heads

__all__ = ["Observation"]


class Observation:
    """The input of an attention module, from which its queries and keys can be had again.

    Queries are computed anew for the few rows a method asks for; keys come from the cache, which
    has them. So the attention itself runs as fast as it can, and keeps no attention matrix. Where
    ranks share the heads, these are a rank's own; `heads` tells how to put together what all have.
    """

    def __init__(self, attention: nn.Module, arguments: dict[str, Any]) -> None:
        self.attention = attention
        self.hidden: Tensor = arguments["hidden_states"]
        self.cos, self.sin = arguments["position_embeddings"]
        self.positions: Tensor | None = None
        if takes_positions(attention):
            self.positions = arguments["position_ids"]
        self.cache = arguments.get("past_key_values")
        if torch.compiler.is_compiling() and self.cache is not None and put_away(self.cache):
            self.cache = None  # where nobody kept what the attention got: computed anew
        self._unrotated_keys: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.attention.scaling

    def heads(self, query: Tensor) -> AllHeads:
        """Where the heads are of which `query` [B, H, ...] has some."""
        heads = self.attention.config.num_attention_heads
        return AllHeads(heads, None) if query.shape[1] == heads else all_heads(self.attention)

    def queries(self, rows: slice, rotary: bool = True) -> Tensor:
        """[B, Hq, M, D] of the given rows, with their rotary position embedding or without."""
        states = project(self.attention, "q_proj", self.hidden[:, rows])
        if not rotary:
            return states
        positions = None if self.positions is None else self.positions[:, rows]
        cos, sin = self.cos[:, rows], self.sin[:, rows]
        return rotate(self.attention, states, states[:, :1], cos, sin, positions)[0]

    def keys(self, past: int) -> Tensor:
        """[B, Hkv, past + S, D] of all rows, as the attention got them from the cache."""
        if self.cache is not None:
            return self._cached(past, 0)
        keys = self.unrotated_keys()
        return rotate(self.attention, keys[:, :1], keys, self.cos, self.sin, self.positions)[1]

    def unrotated_keys(self) -> Tensor:
        """[B, Hkv, S, D] of all rows, without the rotary position embedding."""
        if self._unrotated_keys is None:
            self._unrotated_keys = project(self.attention, "k_proj", self.hidden)
        return self._unrotated_keys

    def values(self, past: int) -> Tensor:
        """[B, Hkv, past + S, D] of all rows, as the attention got them from the cache."""
        if self.cache is not None:
            return self._cached(past, 1)
        return project(self.attention, "v_proj", self.hidden)

    def _cached(self, past: int, which: int) -> Tensor:
        rows = past + self.hidden.shape[1]
        held = attended(self.cache, self.attention.layer_idx)[which]
        return held if held.shape[2] == rows else held[:, :, :rows]
