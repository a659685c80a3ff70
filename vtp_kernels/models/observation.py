"""What one layer's attention saw, kept until the next layer decides which rows stay."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["Observation"]


class Observation:
    """The input of an attention module, from which its queries and keys can be had again.

    Queries are computed anew for the few rows a method asks for; keys come from the cache, which
    has them. So the attention itself runs as fast as it can, and keeps no attention matrix.
    """

    def __init__(self, attention: nn.Module, arguments: dict[str, Any]) -> None:
        self.attention = attention
        self.hidden: Tensor = arguments["hidden_states"]
        self.cos, self.sin = arguments["position_embeddings"]
        self.cache = arguments.get("past_key_values")

    @property
    def scale(self) -> float:
        return self.attention.scaling

    def queries(self, rows: slice) -> Tensor:
        """[B, Hq, M, D] of the given rows, with their rotary position embedding."""
        states = self._heads(self.attention.q_proj, self.hidden[:, rows])
        return self._rotate(states, self.cos[:, rows], self.sin[:, rows])

    def keys(self, past: int) -> Tensor:
        """[B, Hkv, past + S, D] of all rows, as the cache holds them."""
        length = past + self.hidden.shape[1]
        if self.cache is not None:
            return self.cache.layers[self.attention.layer_idx].keys[:, :, :length]
        return self._rotate(self._heads(self.attention.k_proj, self.hidden), self.cos, self.sin)

    def _heads(self, projection: nn.Module, hidden: Tensor) -> Tensor:
        states = projection(hidden)
        return states.view(*states.shape[:2], -1, self.attention.head_dim).transpose(1, 2)

    def _rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The function that the layer itself uses stands beside it in its module.
        rotary = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb
        return rotary(states, states[:, :1, :, :], cos, sin)[0]
