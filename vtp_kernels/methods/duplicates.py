"""Rows that are left when duplicates have left, round by round."""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.contract.counts import moved
from vtp_kernels.contract.groups import marked

from .scorers import directions

__all__ = ["most_distinct"]

ROUND = 8
"""Rows that leave in a round. With more, rows leave that were similar only to others that leave."""


def most_distinct(
    features: Tensor,
    scores: Tensor,
    among: Tensor,
    comparable: Tensor,
    counts: list[int],
    sizes: list[int],
) -> Tensor:
    """bool [G, N]: of the rows `among` bool [G, N] of each group `counts[g]` that differ.

    In the order of their scores, the highest first, every second row is compared with those between
    by the cosine of `features` [G, N, C]; the most similar, at most ROUND of them, leave; the rest
    of that half, the most similar first, and the other half go into the next round. Rows that are
    not `comparable` bool [G, N], or not finite, leave before all others. Equal similarities: the
    row that comes first leaves.

    sizes: how many rows each group has, which tells how many rounds there may be. Nothing waits.
    """
    length = features.shape[1]
    unit = directions(features)
    comparable = comparable & unit.isfinite().all(2) & among
    similar = unit.nan_to_num() @ unit.nan_to_num().transpose(1, 2)
    wanted = moved(torch.tensor(counts), features.device)
    rank = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    # Comparable rows by rank, then other rows, then what is no row.
    kind = torch.where(comparable, 0, torch.where(among, 1, 2))
    order = rank.gather(1, kind.gather(1, rank).argsort(dim=1, stable=True))
    left = comparable.sum(1)
    for width in _widths(sizes, counts):
        order = order[:, :width]
        leave = (left - wanted).clamp(0, ROUND).minimum((left + 1) // 2)
        order = order.gather(1, _round(similar, order, left, leave))
        left = left - leave
    place = torch.arange(order.shape[1], device=features.device)
    return marked(torch.where(place < wanted[:, None], order, -1), length)


def _widths(sizes: list[int], counts: list[int]) -> list[int]:
    """Of each round, how many rows may take part, if all those of each group do."""
    widths, left = [], [max(pair) for pair in zip(sizes, counts, strict=True)]
    while left != counts:
        widths.append(max(left))
        left = [n - min(ROUND, n - k, (n + 1) // 2) for n, k in zip(left, counts, strict=True)]
    return widths


def _round(similar: Tensor, order: Tensor, left: Tensor, leave: Tensor) -> Tensor:
    """int64 [G, W]: the places in `order` [G, W] in the order of the next round. Of the rows in
    it the first `left` [G] take part, and the last `leave` of these are then beyond them."""
    width = order.shape[1]
    place = torch.arange(width, device=order.device)
    takes_part = place < left[:, None]
    even, odd = order[:, ::2], order[:, 1::2]
    rows = similar.gather(1, even[:, :, None].expand(-1, -1, similar.shape[2]))
    between = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1))
    between = between.masked_fill(~takes_part[:, None, 1::2], -torch.inf)
    nearest = torch.cat((between, torch.full_like(rows[:, :, :1], -torch.inf)), dim=2).amax(2)
    nearest = nearest.masked_fill(~takes_part[:, ::2], -torch.inf)
    falling = nearest.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(falling).scatter_(1, falling, place[: even.shape[1]].expand_as(falling))
    key = (2 * width + place).repeat(len(order), 1)  # what takes no part stays behind, as it is
    first = torch.where(rank < leave[:, None], 3 * width + rank, rank)
    key[:, ::2] = torch.where(takes_part[:, ::2], first, key[:, ::2])
    key[:, 1::2] = torch.where(takes_part[:, 1::2], width + place[1::2], key[:, 1::2])
    return key.argsort(dim=1)
