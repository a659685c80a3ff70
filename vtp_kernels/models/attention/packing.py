"""The rows of a batch without the padding between them.

Prompts of a batch that keep different numbers of rows are padded to the longest, and one that keeps
everything would hold up all others. But only attention and the KV cache need the batch: whatever
looks at each row by itself (norms, projections, the MLP: nearly all of a layer's work) can do with
the real rows, one behind the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.contract.counts import moved

__all__ = ["Packing"]


class Packing:
    """Between a batch of B prompts, W rows wide, and its N real rows: the last ones of each prompt.

    Parameters
    ----------
    counts : real rows of each prompt
    width : W
    device : of the tensors to come
    """

    #: Moving rows costs a few copies of them in every layer, so there must be this much padding.
    LEAST_PADDING = 0.2

    def __init__(self, counts: list[int], width: int, device: torch.device) -> None:
        self.batch = len(counts)
        ends = range(width, (self.batch + 1) * width, width)
        rows = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        real = torch.arange(width) >= width - torch.tensor(counts)[:, None]
        places = (real.flatten().cumsum(0) - 1).clamp(min=0)
        self.rows = moved(torch.cat(rows), device)  # int64 [N]
        self.places = moved(places, device)  # int64 [B * W]

    @classmethod
    def of(cls, counts: list[int], width: int, device: torch.device) -> Packing | None:
        """None where there is too little padding to be worth it."""
        if sum(counts) > (1 - cls.LEAST_PADDING) * len(counts) * width:
            return None
        return cls(counts, width, device)

    def pack(self, rows: Tensor) -> Tensor:
        """[B, W, ...] as [1, N, ...]"""
        return rows.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, rows: Tensor) -> Tensor:
        """[1, N, ...] as [B, W, ...]; padding is a copy of some real row."""
        return rows[0].index_select(0, self.places).unflatten(0, (self.batch, -1))
