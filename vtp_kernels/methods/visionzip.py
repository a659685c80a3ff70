"""VisionZip (arXiv 2412.04467): before the first layer, few tokens that CLS looks at, and few that
stand for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .budget import check_keep, visual_budget
from .merging import Merging, merged_events
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["VisionZip"]


@dataclass(frozen=True)
class VisionZip(BudgetedMethod, key="visionzip"):
    """Before layer 0, keep dominant tokens, and contextual ones into which all others are merged
    (sections 3.2 and 3.3). What the text asks is not looked at.

    Dominant are the tokens that get most attention from CLS, mean over heads, in the layer of the
    vision tower whose output the features are (in LLaVA-1.5 the last but one). Of the others every
    n-th is a contextual token, at even steps; what is left joins the one whose key in that layer,
    mean over heads, is nearest by its cosine, and a contextual token becomes itself plus the mean
    of those that joined it.

    Our reading: the paper merges what the tower puts out, before the projector; here rows are
    merged behind it, as the language model gets them, in the contextual token's place. Where the
    tower has no CLS, attention is that of all its rows. Rows that show no token (`image_newline`)
    are the first to leave, and are merged into nothing.

    Parameters
    ----------
    keep : int | float
        Dominant and contextual tokens together: a count, or a share of the visual tokens. The paper
        keeps 64, 128 and 192 of 576.
    contextual : int | float
        How many of these are contextual: a count, or a share of `keep`. The paper has 10 of 64, 20
        of 128 and 30 of 192.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`. Nothing is merged across pictures then. The paper has
        one picture in a prompt.
    """

    keep: int | float = 64
    contextual: int | float = 0.15625
    per: str = "prompt"
    needs_tower: ClassVar[tuple[str, ...]] = ("attention", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.contextual, "VisionZip.contextual")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0, self.keep, "VisionZip.keep", "VisionZip.keep"),)

    def vision_source(self) -> tuple[str, str]:
        return "attention", "keys"

    def needs_ops(self) -> tuple[str, ...]:
        return ("assign_rows", "merge_rows")

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        budgets = self.budgets(layer, rows)
        if not budgets.are_a_choice:
            return rows.keep_of_each(*budgets, None)
        groups, vision = rows.grouped(budgets.group, budgets.there), rows.vision
        counts = budgets.of_groups
        contextual = [visual_budget(self.contextual, n) for n in counts]
        scores = vision.of_rows("attention")
        rows.note_scores(scores, rows.visual)
        dominant = groups.best(
            groups.of(scores),
            [n - few for n, few in zip(counts, contextual, strict=True)],
        )
        rest = groups.here & ~dominant
        shown = rest & groups.of(vision.shows >= 0)
        targets = groups.evenly(groups.first_enough(shown, rest, contextual), contextual)
        kept = rows.keep_groups(groups, dominant | groups.where(targets), budgets.counts)
        keys = groups.of(vision.of_rows("keys"))
        return Merging(groups, targets, shown, keys, "add_mean").into(kept, layer, rows)

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        return merged_events(memory)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """Sums of the rows that are merged. Attention and the cosines of keys are the vision
        tower's, which is not counted."""
        return 0 if kept in (0, visual) else visual * config.hidden_size
