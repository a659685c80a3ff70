"""HiPrune (arXiv 2508.00553): before the first layer, by two layers of the vision tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtp_kernels.contract.vision import Ask

from .budget import check_share
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["HiPrune"]

CROSS = 5  # an anchor and the tokens around it


@dataclass(frozen=True)
class HiPrune(BudgetedMethod, key="hiprune"):
    """Before layer 0, keep anchors, buffers around them, and registers (section 3.3).

    Anchors are the tokens that get most attention in a layer in the middle of the vision tower,
    which looks at objects. Buffers stand above, below, left and right of them. What is left of
    `keep` are registers: the tokens that get most attention in the layer whose output the features
    are, which looks at the whole. Attention is that of all rows of the tower, mean over these and
    over heads; no CLS is needed. What the text asks is not looked at.

    Our reading: what is beyond a picture's edge is no buffer (the published code goes on in the
    next line), crops of a picture are pictures of their own, and where buffers are too many for
    `keep` those stay that are the better registers. Rows that show no token (`image_newline`) are
    the first to leave.

    Parameters
    ----------
    keep : int | float
        Count, or share of the visual tokens. The paper keeps 64, 128 and 192 of 576.
    around : float
        Share of `keep` for anchors and buffers: a fifth of it are anchors. The paper's alpha, 0.1.
    middle : int | float
        Layer of the tower for anchors: an index, from the end if it is negative, or the share of
        its layers that have run by then. The paper takes the 9th of 24, and of Qwen2.5-VL's 32 the
        16th.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`. The paper has one picture in a prompt.
    """

    keep: int | float = 64
    around: float = 0.1
    middle: int | float = 0.375
    per: str = "prompt"
    needs_tower: ClassVar[tuple[str, ...]] = ("received", "layers", "grids")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.around, "HiPrune.around")
        self.vision_source()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0, self.keep, "HiPrune.keep", "HiPrune.keep"),)

    def vision_source(self) -> tuple[Ask, Ask]:
        return Ask("received", self.middle, "HiPrune.middle"), Ask("received")

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        budgets = self.budgets(layer, rows)
        if not budgets.are_a_choice:
            return rows.keep_of_each(*budgets, None)
        groups = rows.grouped(budgets.group, budgets.there)
        middle, deep = (rows.vision.of_rows(ask) for ask in self.vision_source())
        rows.note_scores(deep, rows.visual)
        middle, deep = groups.of(middle), groups.of(deep)
        counts = budgets.of_groups
        anchors = [math.floor(n * self.around / CROSS + 0.5) for n in counts]
        chosen = groups.best(middle, anchors)
        buffers = groups.of(rows.vision.next_to(groups.in_rows(chosen))) & ~chosen
        for among in (buffers, groups.here):
            left = groups.numbers(counts) - chosen.sum(1)
            chosen = chosen | groups.best(deep, left, among & groups.here & ~chosen)
        return rows.keep_groups(groups, chosen, budgets.counts)
