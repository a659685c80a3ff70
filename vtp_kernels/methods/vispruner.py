"""VisPruner (arXiv 2412.01818): before the first layer, what matters, and no duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .budget import check_share
from .duplicates import most_distinct
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["VisPruner"]


@dataclass(frozen=True)
class VisPruner(BudgetedMethod, key="vispruner"):
    """Before layer 0, keep important tokens, and of the others those that are no duplicates
    (section 3). What the text asks is not looked at.

    Important are the tokens that get most attention from CLS, mean over heads, in the layer of the
    vision tower whose output the features are. The others, the most important first, lose
    duplicates in rounds: every second one, from the first on, is compared with those between, and
    the eight whose nearest of these is most similar (cosine of features) leave; those that are left
    of the first half, the most similar first, and the second half begin the next round.

    Our reading: where the tower has no CLS, attention is that of all its rows. Rows that show no
    token (`image_newline`) leave before any other. All tokens of a prompt are compared with each
    other, and every eight that leave take a round: for videos and many crops let `per` be smaller.

    Parameters
    ----------
    keep : int | float
        Count, or share of the visual tokens. The paper keeps 32 to 192 of 576.
    important : float
        Share of `keep` for important tokens, rounded down.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`; tokens are compared with those of the same prompt,
        picture or frame. The paper has one picture in a prompt.
    """

    keep: int | float = 64
    important: float = 0.5
    per: str = "prompt"
    needs_tower: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.important, "VisPruner.important")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0, self.keep, "VisPruner.keep", "VisPruner.keep"),)

    def vision_source(self) -> tuple[str, str]:
        return "attention", "hidden"

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        budgets = self.budgets(layer, rows)
        if not budgets.are_a_choice:
            return rows.keep_of_each(*budgets, None)
        groups, vision = rows.grouped(budgets.group, budgets.there), rows.vision
        counts = budgets.of_groups
        important = [int(n * self.important) for n in counts]
        scores = vision.of_rows("attention")
        rows.note_scores(scores, rows.visual)
        scores = groups.of(scores)
        chosen = groups.best(scores, important)
        others = most_distinct(
            groups.of(vision.of_rows("hidden")),
            scores,
            groups.here & ~chosen,
            groups.of(vision.shows >= 0),
            [n - few for n, few in zip(counts, important, strict=True)],
            sizes=groups.sizes,
        )
        return rows.keep_groups(groups, chosen | others, budgets.counts)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """The cosines of all pairs, of features as wide as the language model's rows: a bound, for
        towers are narrower, and only rows of one group are compared."""
        return 0 if kept in (0, visual) else 2 * visual**2 * config.hidden_size
