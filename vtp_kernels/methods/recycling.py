"""Some of the tokens that would leave stay, as fewer rows (SparseVLM, arXiv 2410.04417)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .budget import visual_budget
from .merging import Merging

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

    from .stages import Budgets

__all__ = ["recycled", "recycling_macs"]

RECYCLED, CLUSTERED = 0.3, 0.1


def recycled(layer: int, rows: PromptRows, budgets: Budgets, scores: Tensor) -> Kept:
    """Of each group the rows with the highest scores [B, S], and a few into which the best of the
    others are merged; together as many as the group's budget."""
    groups = rows.grouped(budgets.group, budgets.there)
    counts = budgets.of_groups
    pools = [visual_budget(RECYCLED, n - k) for n, k in zip(groups.sizes, counts, strict=True)]
    centres = [min(_centres(n), k) for n, k in zip(pools, counts, strict=True)]
    rows.note_scores(scores, rows.visual)
    scores = groups.of(scores)
    stay = groups.best(scores, [k - few for k, few in zip(counts, centres, strict=True)])
    pool = groups.best(scores, pools, groups.here & ~stay)
    targets = groups.evenly(pool, centres)
    kept = rows.keep_groups(groups, stay | groups.where(targets), budgets.counts)
    hidden = groups.of(rows.hidden).detach()
    return Merging(groups, targets, pool, hidden, "mean").into(kept, layer, rows)


def recycling_macs(leaving: int, width: int) -> int:
    """The cosines of recycled rows to centres, where so many rows of `width` channels leave."""
    pool = visual_budget(RECYCLED, leaving)
    return pool * _centres(pool) * width


def _centres(pool: int) -> int:
    """One at least, where there is anything to be merged into it."""
    return max(visual_budget(CLUSTERED, pool), int(pool > 1))
