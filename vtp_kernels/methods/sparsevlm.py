"""SparseVLM (arXiv 2410.04417): in stages, ranked by the words that have to do with the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_kernels._shown import shown
from vtp_kernels.flop_counts.text import head_dim

from .merging import merged_events
from .raters import raters
from .recycling import recycled, recycling_macs
from .stages import LayeredMethod

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["SparseVLM"]

RATERS = "raters"  # in a call's memory


@dataclass(frozen=True)
class SparseVLM(LayeredMethod, key="sparsevlm"):
    """At each of `layers`, keep the visual tokens that raters attend to most, and recycle some of
    the others (sections 3.2 to 3.4).

    Raters are rows of text behind the first picture, chosen once, by what enters layer 0: each
    visual token shares its weight out by a softmax over the text of their inner products, and
    raters are the rows whose mean share is above the mean. Tokens are ranked by the attention that
    raters pay in the layer before, mean over raters and heads. Of those that are too many the best
    30 % are recycled: they become a tenth as many rows, which stay.

    Our reading: recycled rows count in `keep`. Every tenth of them, at even steps, is a centre; the
    others go to the centre of nearest hidden state, by its cosine, and each centre becomes the mean
    of its own, in its place. (The paper clusters by density.) Where no row is above the mean, all
    text is a rater. The published numbers of tokens are used as they are; the paper also tells how
    to find a layer's number by the rank of its attention.

    Since it looks at what enters layer 0, no method that acts there goes into a chain with it.

    Parameters
    ----------
    layers : tuple of int
        Ascending, each at least 1.
    keep : tuple of int | float
        One per layer: counts, or shares of the tokens the prompt came with. The default is the
        paper's of 192 tokens on the mean: 300, 200 and 110 of 576. Of 128: 303, 110, 36; of 64: 66,
        30, 17.
    recycle : bool
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`. The paper has one picture in a prompt.
    """

    layers: tuple[int, ...] = (2, 6, 15)
    keep: tuple[int | float, ...] = (0.521, 0.347, 0.191)
    recycle: bool = True
    per: str = "prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.recycle, bool):
            raise TypeError(f"SparseVLM.recycle: expected a bool, got {shown(self.recycle)}")
        super().__post_init__()
        if 0 in self.layers:
            raise ValueError(
                "SparseVLM.layers: tokens are ranked by the attention of the layer before, and 0 "
                "has none"
            )

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return (0, *self.layers) if self.layers else ()

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.layers)

    def needs_ops(self) -> tuple[str, ...]:
        return ("assign_rows", "merge_rows") if self.recycle else ()

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        if layer == 0:
            rows.memory[RATERS] = raters(rows)
            return None
        budgets = self.budgets(layer, rows)
        if not budgets.are_a_choice:
            return rows.keep_of_each(*budgets, None)
        paying = rows.memory[RATERS].gather(1, rows.origin) & rows.text
        end = rows.prompt_end + 1
        scores = rows.attention_scores(slice(0, end), paying[:, :end])
        if self.recycle:
            return recycled(layer, rows, budgets, scores)
        return rows.keep_of_each(*budgets, scores)

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        return merged_events(memory)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """The attention of all text, at most of which are raters: queries and logits; the cosines
        of recycled rows to centres; and at the first of `layers` the shares by which raters are
        chosen."""
        if kept in (0, visual):
            return 0
        width, rows = config.hidden_size, text + visual
        macs = text * config.num_attention_heads * head_dim(config) * (width + rows)
        if self.recycle:
            macs += recycling_macs(visual - kept, width)
        if layer == self.layers[0]:
            macs += text * visual * width
        return 2 * macs
