"""The result of every op that chooses tokens."""

from typing import NamedTuple

from torch import Tensor


class Selection(NamedTuple):
    """Chosen token rows of a batch, ready for torch indexing.

    Attributes:
        indices: int64 [B, K], ascending within a row; the unused tail is -1.
        counts: int32 [B], how many indices of each row are real.
    """

    indices: Tensor
    counts: Tensor
