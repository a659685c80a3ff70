"""Which words have to do with the pictures (SparseVLM, arXiv 2410.04417)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.contract.counts import less

from .scorers import text_rows, wide

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import PromptRows

__all__ = ["raters"]

MARGIN = 1e-6  # so that rounding makes no rater of a row that is like all others


def raters(rows: PromptRows) -> Tensor:
    """bool [B, columns], before layer 0: rows of text that have more to do with what is shown than
    the mean of them has."""
    until, asks = text_rows(rows)
    asks = pad(asks, (0, rows.text.shape[1] - until.stop))
    counts = less(rows.text_now, rows.text_before, rows.drafts)
    words, selection, valid = rows.gather(asks, counts)
    products = wide(rows.hidden) @ wide(words).transpose(1, 2)
    if valid is not None:
        products = products.masked_fill(~valid[:, None], -torch.inf)
    shares = products.softmax(2).masked_fill(~rows.visual[:, :, None], 0).sum(1)
    mean = rows.visual.sum(1, keepdim=True) / asks.sum(1, keepdim=True).clamp(min=1)
    above = rows.spread((shares > mean * (1 + MARGIN)).float(), selection) > 0
    return torch.where(above.any(1, keepdim=True), above, asks)
