"""What was seen of pictures that have tokens according to their size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtp_kernels.contract.counts import moved
from vtp_kernels.contract.vision import Ask, Seen

__all__ = ["cut", "runs", "seen_ragged", "squares"]


def runs(lengths: list[int]) -> list[Tensor]:
    """int64 [n, 1] a picture: tokens that are rows, one picture behind the other."""
    return [rows[:, None] for rows in torch.arange(sum(lengths)).split(lengths)]


def squares(rows: int, columns: int, side: int) -> Tensor:
    """int64 [N, side * side]: the patches of each square of a picture of rows x columns patches,
    line by line. Patches at its edges that make no square are left out."""
    down, across = rows // side, columns // side
    order = torch.arange(rows * columns).view(rows, columns)[: down * side, : across * side]
    cut = order.reshape(down, side, across, side).transpose(1, 2)
    return cut.reshape(down * across, side * side)


def cut(grids: list[tuple[int, int]], side: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Of pictures of rows x columns patches, one behind the other: the patches of each square, and
    rows and columns of squares."""
    tokens, first = [], 0
    for rows, columns in grids:
        tokens.append(first + squares(rows, columns, side))
        first += rows * columns
    return tokens, [(rows // side, columns // side) for rows, columns in grids]


def seen_ragged(
    states: Tensor,
    looked: Mapping[Ask, Tensor],
    tokens: list[Tensor],
    grids: list[tuple[int, int]],
) -> Seen:
    """states [R, C], and what was looked at, of rows; `tokens`, int64 [n, P] on the CPU for each
    picture: the rows that each of its visual tokens is the mean of; `grids`, how these stand. All
    tokens become visual tokens, in order.
    """
    lengths = torch.tensor([len(picture) for picture in tokens])
    index = pad_sequence(tokens, batch_first=True)
    here = torch.arange(index.shape[1]) < lengths[:, None]
    index, shows = moved(index, states.device), here.view(-1).nonzero()[:, 0]
    features = summary = states[index].mean(2)
    if here.all():
        here = None
    else:
        summary = features.masked_fill(~moved(here, states.device)[:, :, None], 0)
    # A mean and its share, not a sum: half precision may not hold that.
    share = moved(index.shape[1] / lengths, states.device).to(states.dtype)
    return Seen(
        features=features,
        summary=summary.mean(1) * share[:, None],
        values={ask: rows[index].mean(2) for ask, rows in looked.items()},
        shows=shows,
        grids=grids,
        here=here,
    )
