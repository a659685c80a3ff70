"""The ranks of a tensor-parallel model, each of which computes some of the heads.

What a method decides by must be the same on all of them, to the bit, or they would keep different
tokens. Hidden states are: each layer sums its output over the ranks. What comes from heads is put
together here, before anything is chosen by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..modules.placement import out_features
from .projections import is_gated

__all__ = ["AllHeads", "all_heads"]


class AllHeads(NamedTuple):
    """What is known of a rank's heads, made into what is known of all of them.

    The queries tell whether anything is missing: weights that are in pieces only while nothing
    computes with them (FSDP) are no reason to ask other ranks, which have other prompts.
    """

    heads: int
    """Query heads in all. Every rank has equally many."""
    group: Any
    """The ranks they are spread over, or None."""

    def mean(self, scores: Tensor, query: Tensor) -> Tensor:
        """`scores`, a mean over the heads of `query` [B, H, ...], over all heads."""
        if not self.are_spread(query):
            return scores
        total = scores.contiguous()
        dist.all_reduce(total, group=self.group)
        return total * (query.shape[1] / self.heads)

    def gather(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """[B, H, ...] each, with all heads in their order."""
        if not self.are_spread(query):
            return query, *others
        return tuple(self._gather(states.contiguous()) for states in (query, *others))

    def are_spread(self, query: Tensor) -> bool:
        """Whether other ranks have heads that `query` [B, H, ...] lacks."""
        return self.group is not None and query.shape[1] != self.heads

    def _gather(self, states: Tensor) -> Tensor:
        parts = [torch.empty_like(states) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, states, group=self.group)
        return torch.cat(parts, dim=1)


def all_heads(attention: nn.Module) -> AllHeads:
    """Where the heads of a Llama-like attention module are.

    Raises NotImplementedError where that cannot be told, or ranks have different numbers of them.
    """
    query = getattr(attention, "q_proj", None)
    if query is None:
        raise NotImplementedError(
            f"an attention of class {type(attention).__name__} is not supported: it has no q_proj "
            "from which to have its queries"
        )
    config, features = attention.config, out_features(query)
    if features != config.num_attention_heads * attention.head_dim and not is_gated(attention):
        raise NotImplementedError(
            f"a query projection to {features} features for {config.num_attention_heads} "
            f"heads of {attention.head_dim} is not supported; where ranks share the heads, weights "
            "must be DTensors, which know of their whole"
        )
    group = _group(getattr(query, "weight", None))
    size = 1 if group is None else dist.get_world_size(group)
    if config.num_attention_heads % size or config.num_key_value_heads % size:
        raise NotImplementedError(
            f"{config.num_attention_heads} query and {config.num_key_value_heads} key heads on "
            f"{size} ranks are not supported: every rank must have equally many"
        )
    return AllHeads(config.num_attention_heads, group if size > 1 else None)


def _group(weight: Any) -> Any:
    """The ranks that have a piece each of a query projection, or None if it is in one piece. Only
    a DTensor can be in pieces."""
    if not any(placement.is_shard() for placement in getattr(weight, "placements", ())):
        return None
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        mesh = mesh["tp"]
    elif mesh.ndim > 1:
        raise NotImplementedError(
            f"weights on a device mesh of dimensions {names or mesh.ndim} are not supported: name "
            "the one over which heads are spread 'tp'"
        )
    return mesh.get_group()
