"""DART (arXiv 2502.11494): after the first layers, the visual tokens least like a few pivots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.groups import ranked, taken

from .scorers import text_rows, wide
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["DART"]


@dataclass(frozen=True)
class DART(BudgetedMethod, key="dart"):
    """Before `layer`, keep visual tokens that are no duplicates of pivots (section 4).

    Pivots are the visual tokens, and the rows of text behind the first picture, whose keys in the
    layer before have the largest L1 norms. To each in turn, the visual ones first and in each kind
    the largest norm first, come the visual tokens left that are least similar to it, by the cosine
    of hidden states; equally many to each.

    Our reading: hidden states are compared as they enter the layer; the published code puts them
    through the model's last norm. Visual pivots count in `keep`, and where it cannot be shared out
    equally the first pivots get one more.

    Parameters
    ----------
    layer : int
        At least 1: keys are those of layer - 1.
    keep : int | float
        Count, or share of the visual tokens. The paper keeps 64, 128 and 192 of 576.
    visual_pivots, text_pivots : int
        At least one in all. Where there are fewer rows of text all of them are pivots.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`, and of what there are so many visual pivots; those of
        text are the prompt's. The paper has one picture in a prompt.
    """

    layer: int = 2
    keep: int | float = 64
    visual_pivots: int = 4
    text_pivots: int = 4
    per: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer == 0:
            raise ValueError("DART.layer: keys are those of the layer before, and 0 has none")
        for name in ("visual_pivots", "text_pivots"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"DART.{name}: expected an int, got {shown(count)}")
            if count < 0:
                raise ValueError(f"DART.{name}: expected at least 0, got {count}")
        if self.visual_pivots + self.text_pivots == 0:
            raise ValueError("DART.visual_pivots: expected a pivot at least, visual or of text")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.keep, "DART.layer", "DART.keep"),)

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        budgets = self.budgets(layer, rows)
        if not budgets.are_a_choice:
            return rows.keep_of_each(*budgets, None)
        groups = rows.grouped(budgets.group, budgets.there)
        counts = budgets.of_groups
        norms, hidden = rows.key_norms(), wide(rows.hidden)
        mine, (until, asks) = groups.of(hidden), text_rows(rows)
        visual = ranked(groups.of(norms), groups.here, [min(self.visual_pivots, n) for n in counts])
        text = ranked(norms[:, until], asks, [self.text_pivots] * len(asks))
        pivots = torch.cat((taken(mine, visual), groups.of_prompts(taken(hidden, text))), dim=1)
        there = torch.cat((visual >= 0, groups.of_prompts(text >= 0)), dim=1)
        quotas = _shares(groups.numbers(counts) - (visual >= 0).sum(1), there)
        chosen = groups.where(visual)
        for pivot, quota in zip(pivots.unbind(1), quotas.unbind(1), strict=True):
            likeness = torch.cosine_similarity(pivot[:, None], mine, dim=2)
            chosen = chosen | groups.best(-likeness, quota, groups.here & ~chosen)
        return rows.keep_groups(groups, chosen, budgets.counts)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """The cosines to all pivots."""
        pivots = self.visual_pivots + self.text_pivots
        return 0 if kept in (0, visual) else 2 * pivots * visual * config.hidden_size


def _shares(total: Tensor, there: Tensor) -> Tensor:
    """int64 [G, P]: `total` [G] in equal parts to those of P that are there, bool [G, P]; what
    cannot be shared out goes to the first."""
    shares = there.sum(1, keepdim=True).clamp(min=1)
    rank = there.cumsum(1) - 1
    part = total[:, None] // shares + (rank < total[:, None] % shares)
    return torch.where(there, part, 0)
