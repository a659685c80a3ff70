"""Which rows of an image stay: scores by the CLS token of its vision tower, and the best of them.

An image may have been seen in several views (LLaVA-NeXT: as a whole, and in crops). Each has a CLS
token of its own, whose attention adds up to the same; all compete for the image's rows, as they do
in transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.ops import attention_scores, cls_inflection, select_diverse, select_topk

__all__ = ["attention_of_cls", "best_rows", "scores_of_rows", "similarity_to_cls", "unlike_rows"]


def similarity_to_cls(hidden: Tensor) -> Tensor:
    """float32 [V, N]: cosine similarity of all other rows of hidden [V, 1 + N, C] to row 0, CLS."""
    _, similarity = cls_inflection(hidden[:, 1:], hidden[:, 0])
    return similarity


def attention_of_cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """float32 [V, N]: what row 0, CLS, pays to every other row, mean over heads; [V, H, 1 + N, D]
    each."""
    everyone = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return attention_scores(query[:, :, :1], key, candidates=everyone, scale=scale)[:, 1:]


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
