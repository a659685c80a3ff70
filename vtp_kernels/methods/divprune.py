"""DivPrune (arXiv 2503.02175): before layer 0, the visual tokens farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(BudgetedMethod, key="divprune"):
    """Before layer 0, keep visual tokens that are as unlike each other as can be (section 3.2).

    Of the rows that enter the language model, with distance 1 - cosine. The first is the one whose
    nearest other row is farthest away; then, one by one, the row whose smallest distance to those
    chosen is largest (`vtp_kernels.select_diverse`). No attention is looked at, and no text: the
    same tokens stay whatever is asked. Equal distances go to the earlier token. Rows that show
    nothing, as `image_newline`, are among the others.

    Parameters
    ----------
    keep : int | float
        Count, or share of the visual tokens. The paper keeps 9.8 % in LLaVA-1.5 and LLaVA-NeXT.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`, and among what tokens differ. The paper has one picture
        in a prompt, or chooses among all frames of its video; the other two are ours.
    """

    keep: int | float = 64
    per: str = "prompt"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0, self.keep, "DivPrune.keep", "DivPrune.keep"),)

    def needs_ops(self) -> tuple[str, ...]:
        return ("select_diverse",)

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        return rows.keep_diverse(*self.budgets(layer, rows), rule="maxmin")

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """The cosines of all pairs. Where pictures have budgets of their own there are fewer, and
        this is a bound."""
        return 0 if kept in (0, visual) else 2 * visual**2 * config.hidden_size
