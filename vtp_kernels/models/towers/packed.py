"""Attention in rows that lie one behind the other, in segments that each attend to themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtp_kernels.contract.counts import moved
from vtp_kernels.ops import attention_scores

from .layers import Layers, scale_of

__all__ = ["PackedLayers", "received_in_segments"]


class PackedLayers(Layers):
    """Pictures of any size, one behind the other."""

    def _prefix(self) -> int:
        return 0

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
        """float32 [R], over the rows of all pictures in the order of this layer."""
        lengths = self.segments(arguments, given)
        return received_in_segments(query, key, lengths, scale_of(attention), backend)

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [R, H, D] of all rows. None is CLS."""
        raise NotImplementedError

    def put_out(self, output: Any) -> Tensor:
        return super().put_out(output).flatten(0, -2)

    def segments(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[int]:
        """How many rows attend to each other, segment by segment."""
        raise NotImplementedError


class Batch(NamedTuple):
    """Segments of like length beside each other: rows int64 [B, W], valid bool [B, W], on the
    CPU."""

    rows: Tensor
    valid: Tensor


def received_in_segments(
    query: Tensor, key: Tensor, lengths: list[int], scale: float, backend: str | None
) -> Tensor:
    """float32 [R]: the attention that each row gets from the rows of its segment, mean over these
    and over heads. query, key [R, H, D]; `lengths` of the segments add up to R.

    Segments are padded to batches, one for all whose lengths have equally many binary digits: less
    than half of one is padding, and a small picture does not cost what a large one beside it costs.
    """
    scores, places = [], torch.empty(len(query), dtype=torch.long)
    done = 0
    for rows, valid in _batches(lengths):
        index = moved(rows, query.device)
        here = moved(valid, query.device)
        everything = bool(valid.all())
        received = attention_scores(
            query[index].transpose(1, 2),
            key[index].transpose(1, 2),
            candidates=here,
            valid=None if everything else here,
            query_valid=None if everything else here,
            scale=scale,
            backend=backend,
        )
        scores.append(received.flatten())
        places[rows[valid]] = done + torch.arange(rows.numel()).view_as(rows)[valid]
        done += rows.numel()
    return torch.cat(scores)[moved(places, query.device)]


def _batches(lengths: list[int]) -> list[Batch]:
    """The segments of each batch."""
    length = torch.tensor(lengths)
    first = length.cumsum(0) - length
    digits = torch.tensor([n.bit_length() for n in lengths])
    batches = []
    for kind in digits.unique().tolist():
        if kind == 0:
            continue  # no rows
        start, count = first[digits == kind, None], length[digits == kind, None]
        column = torch.arange(int(count.max()))
        valid = column < count
        batches.append(Batch(start + torch.where(valid, column, 0), valid))
    return batches
