"""Scorers: how important each visual token is. Each maps the prompt's rows to float32 [B, S].

Values at rows that are not visual are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import PromptRows

__all__ = [
    "SCORERS",
    "Scorer",
    "contribution",
    "directions",
    "last_token",
    "random",
    "text",
    "text_rows",
    "wide",
]


def wide(x: Tensor) -> Tensor:
    """As float32; float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def directions(x: Tensor) -> Tensor:
    """Each row, `wide`, over its length; 0 for a row of zeros."""
    x = wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def last_row(rows: PromptRows) -> tuple[slice, None]:
    """The row of the last prompt token, which pays attention to all that comes before it."""
    return slice(rows.prompt_end, rows.prompt_end + 1), None


def text_rows(rows: PromptRows) -> tuple[slice, Tensor]:
    """The text after the prompt's first visual token: rows, and which of these, bool [B, M]. Text
    before it cannot see any image, and would only dilute the mean."""
    is_text = rows.text & (rows.visual.cumsum(1) > 0)
    end = rows.prompt_end + 1
    return slice(0, end), is_text[:, :end]


def last_token(rows: PromptRows, seed: int) -> Tensor:
    """Attention that the last prompt token pays, mean over heads (FastV, arXiv 2403.06764)."""
    return rows.attention_scores(*last_row(rows))


def text(rows: PromptRows, seed: int, rotary: bool = True) -> Tensor:
    """Attention that the text after the prompt's first visual token pays: mean over rows and heads.

    With rotary=False queries and keys have no positions, so that what is near has no advantage.
    """
    return rows.attention_scores(*text_rows(rows), rotary=rotary)


def contribution(rows: PromptRows, seed: int) -> Tensor:
    """Length of what a token adds to the last prompt token's attention output (VisiPruner, arXiv
    2510.17205)."""
    return rows.token_contribution()[1]


def random(rows: PromptRows, seed: int) -> Tensor:
    """A hash of (seed, which visual token of its prompt it is).

    So a token's score depends neither on the batch nor on the padding around it nor on the device,
    and later stages keep subsets of what earlier stages kept.
    """
    # A 32-bit integer mix (xor-shift and odd multiplier, twice) in int64, seeded by a Weyl step.
    start = (seed * 0x9E37_79B9 + 1) & 0xFFFF_FFFF
    mixed = (rows.visual_ordinal + start) & 0xFFFF_FFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x045D_9F3B) & 0xFFFF_FFFF
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).to(torch.float32)  # 24 bits: exact in float32


class Scorer(NamedTuple):
    score: Callable[[PromptRows, int], Tensor]
    needs_attention: bool
    attending: Callable[[PromptRows], tuple[slice, Tensor | None]] | None = None
    """Where scores are the mean attention of some rows: which rows."""


SCORERS = {
    "last_token": Scorer(last_token, needs_attention=True, attending=last_row),
    "contribution": Scorer(contribution, needs_attention=True),
    "text": Scorer(text, needs_attention=True, attending=text_rows),
    "random": Scorer(random, needs_attention=False),
}
