"""Which positions rows have once others have left.

"original": those they had before. Rotary embeddings of kept rows stay as they were, and generated
tokens continue after the unpruned length. Nothing to do.

"contiguous": rows close up. A row's position falls by the number of rows of its prompt that left
before it, and everything generated later falls by the number that left in all: the shift.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["POSITIONS", "close_up"]

POSITIONS = ("original", "contiguous")


def close_up(
    positions: Tensor, origin: Tensor, real: Tensor, prompt: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the rows that are left, closed up, and the shift of all rows after them.

    positions int64 [B, S] and prompt bool [B, S] (False: padding) are those of the whole prompt;
    origin int64 [B, K] says which rows are left, real bool [B, K] which of its entries count.
    Returns int64 [B, K] and [B, 1].
    """
    rank_before = (prompt.cumsum(1) - 1).gather(1, origin)
    rank_now = real.cumsum(1) - 1
    shift = prompt.sum(1, keepdim=True) - real.sum(1, keepdim=True)
    return positions.gather(1, origin) - (rank_before - rank_now), shift
