"""How many pairs of a query and a key there are where rows see anything else than all before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..keys.reach import Reach

__all__ = ["pairs_with_visual"]


def pairs_with_visual(present: Tensor, visual: Tensor, reach: Reach, before: int) -> int:
    """Pairs of rows that are there, one of which sees the other, with a visual token among them.

    present, visual : bool [B, S]
        Which of the call's columns are there, and which are visual tokens.
    reach : of all S columns, counted from `before` columns earlier
    """
    all_before, visual_before = (
        pad(rows.cumsum(1), (1, 0)) for rows in (present, present & visual)
    )
    last = reach.last - before + 1
    first = torch.zeros_like(last) if reach.first is None else reach.first - before
    first, last = (ends.clamp(0, present.shape[1]) for ends in (first, last))
    seen, seen_visual = (
        counts.gather(1, last) - counts.gather(1, first) for counts in (all_before, visual_before)
    )
    return int((torch.where(visual, seen, seen_visual) * present).sum())
