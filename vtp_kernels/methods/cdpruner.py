"""CDPruner (arXiv 2506.10967): before layer 0, visual tokens that differ and that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .scorers import directions, text_rows
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["CDPruner", "relevance"]


@dataclass(frozen=True)
class CDPruner(BudgetedMethod, key="cdpruner"):
    """Before layer 0, keep visual tokens that differ from each other and have to do with the text.

    A determinantal point process with kernel L = diag(r) S diag(r): S are the cosines of the rows
    that enter the language model, r is how relevant each is to the instruction. Greedy MAP (Chen et
    al. 2018): one by one, the row that adds most to the determinant of those chosen
    (`vtp_kernels.select_diverse`).

    Relevance here is the form for models without a CLIP text tower: the cosine of a visual row to
    the embeddings that the language model has of the text behind the first picture, mean over that
    text, scaled to 0 ... 1 over the prompt. That this is all text there, what the chat template
    puts behind the user's words included, and that the cosine counts as it is, is our reading. (The
    published code takes it negated, and from CLIP's two towers, where LLaVA-1.5 has these: there
    similar means less relevant.) Where all rows are as relevant, r is 1.

    Where what is left are copies or combinations of what was chosen, and the determinant is 0 with
    any of them, the most relevant of the others fill up the budget; this is ours.

    Parameters
    ----------
    keep : int | float
        Count, or share of the visual tokens. The paper keeps 32 to 192 of 576.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`, and among what tokens differ. Relevance is scaled over
        the whole prompt. Budgets of single pictures and frames are ours.
    """

    keep: int | float = 64
    per: str = "prompt"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0, self.keep, "CDPruner.keep", "CDPruner.keep"),)

    def needs_ops(self) -> tuple[str, ...]:
        return ("select_diverse",)

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        budgets = self.budgets(layer, rows)
        told = relevance(rows) if budgets.are_a_choice else None
        return rows.keep_diverse(*budgets, rule="dpp", relevance=told)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """Cosines of all pairs, the steps of MAP, and what relevance takes of all rows. Where
        pictures have budgets of their own there are fewer pairs, and this is a bound."""
        if kept in (0, visual):
            return 0
        pairs = visual**2 * config.hidden_size + kept**2 * visual // 2
        return 2 * (pairs + (text + 2 * visual) * config.hidden_size)


def relevance(rows: PromptRows) -> Tensor:
    """float32 [B, S]: how relevant each visual row is to the text behind the first picture, from
    just above 0 to 1; 0 of what has no cosine, such as NaN, and off visual rows."""
    embedded = directions(rows.hidden)
    text, asks = text_rows(rows)
    asked = torch.where(asks[..., None], embedded[:, text], 0)
    # The mean cosine to several rows is the product with their mean direction.
    mean = asked.sum(1) / asks.sum(1, keepdim=True).clamp(min=1)
    cosine = (embedded * mean[:, None]).sum(2)
    among = rows.visual & cosine.isfinite()
    least = torch.where(among, cosine, torch.inf).amin(1, keepdim=True)
    spread = torch.where(among, cosine, -torch.inf).amax(1, keepdim=True) - least
    scaled = torch.where(spread > 0, (cosine - least + 1e-6) / spread, 1)
    return torch.where(among, scaled, 0)
