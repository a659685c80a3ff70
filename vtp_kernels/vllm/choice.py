"""Which rows of an image stay: scores by what its vision tower saw, and the best of them.

An image may have been seen in several views (LLaVA-NeXT: as a whole, and in crops). The attention
that a view's tokens receive adds up to the same in each; all compete for the image's rows, as they
do in transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.ops import attention_scores, cls_inflection, select_diverse, select_topk

__all__ = [
    "attention_received",
    "best_rows",
    "scores_of_rows",
    "similarity_to_whole",
    "unlike_rows",
]


def similarity_to_whole(hidden: Tensor, cls: bool) -> Tensor:
    """float32 [V, N]: cosine similarity of a view's tokens to CLS, row 0 of hidden [V, 1 + N, C];
    without one to the mean of hidden [V, N, C]."""
    tokens, whole = (hidden[:, 1:], hidden[:, 0]) if cls else (hidden, hidden.mean(1))
    return cls_inflection(tokens, whole)[1]


def attention_received(query: Tensor, key: Tensor, scale: float, cls: bool) -> Tensor:
    """float32 [V, N]: what CLS, row 0, pays to every other row, mean over heads, [V, H, 1 + N, D]
    each; without one what a row gets from all, mean over these, too, [V, H, N, D] each."""
    everyone = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    payers = query[:, :, :1] if cls else query
    return attention_scores(payers, key, candidates=everyone, scale=scale)[:, int(cls) :]


def scores_of_rows(scores: Tensor, shows: Tensor) -> Tensor:
    """float32 [R]: the scores [V, N] of the tokens that an image's rows show. `shows`, int64 [R],
    counts tokens over all views, and is -1 for a row that shows none (`image_newline`), whose score
    is not a number."""
    none = scores.new_full((1,), torch.nan)
    return torch.cat((scores.flatten(), none))[shows.to(scores.device)]  # -1 is the last one


def best_rows(scores: Tensor, keep: int) -> Tensor:
    """int64 [keep]: of an image's rows those with the highest scores float32 [R], in order. Equal
    scores: the earlier row; what is not a number stays only where there are not enough others."""
    return select_topk(scores[None], keep).indices[0]


def unlike_rows(rows: Tensor, keep: int) -> Tensor:
    """int64 [keep]: of an image's rows [R, C], as the language model gets them, those that are as
    unlike each other as can be (DivPrune), in order."""
    return select_diverse(rows[None], keep, rule="maxmin").indices[0]
