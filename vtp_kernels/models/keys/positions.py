"""Which positions rows have once others have left.

"original": those they had before. Rotary embeddings of kept rows stay as they were, and generated
tokens continue after the unpruned length. Nothing to do.

"contiguous": rows close up. A row's position falls by the number of rows of its prompt that left
before it, and everything generated later falls by the number that left in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POSITIONS", "close_up", "rows_that_left"]

POSITIONS = ("original", "contiguous")


def close_up(positions: Tensor, origin: Tensor, real: Tensor, prompt: Tensor) -> Tensor:
    """Positions of the rows that are left, closed up: int64 [B, K].

    positions int64 [B, S] and prompt bool [B, S] (False: padding) are those of the whole prompt;
    origin int64 [B, K] says which rows are left, real bool [B, K] which of its entries count.
    """
    rank_before = (prompt.cumsum(1) - 1).gather(1, origin)
    rank_now = real.cumsum(1) - 1
    return positions.gather(1, origin) - (rank_before - rank_now)


def rows_that_left(origin: Tensor, real: Tensor, prompt: Tensor) -> Tensor:
    """Rows of the prompt that are no longer there: bool [B, S]; arguments as of `close_up`."""
    rows = prompt.shape[1]
    here = torch.zeros(len(prompt), rows + 1, dtype=torch.bool, device=prompt.device)
    here.scatter_(1, torch.where(real, origin, rows), True)
    return prompt & ~here[:, :rows]
