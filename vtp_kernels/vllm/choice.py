"""Which tokens of an image stay: scores by the CLS token of its vision tower, and the best of them.

An image may have been seen in several views (LLaVA-NeXT: as a whole, and in crops). Each has a CLS
token of its own, and scores are not compared between views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.ops import attention_scores, cls_inflection, select_topk

__all__ = ["attention_of_cls", "best_rows", "shares", "similarity_to_cls"]


def similarity_to_cls(hidden: Tensor) -> Tensor:
    """float32 [V, N]: cosine similarity of all other rows of hidden [V, 1 + N, C] to row 0, CLS."""
    _, similarity = cls_inflection(hidden[:, 1:], hidden[:, 0])
    return similarity


def attention_of_cls(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """float32 [V, N]: what row 0, CLS, pays to every other row, mean over heads; [V, H, 1 + N, D]
    each."""
    everyone = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return attention_scores(query[:, :, :1], key, candidates=everyone, scale=scale)[:, 1:]


def shares(keep: int, tokens: list[int]) -> list[int]:
    """How many tokens each view keeps, that has so many: even shares of `keep`. What a view cannot
    use goes to the others; what cannot be split goes to the first views, as the whole picture is.

    >>> shares(10, [576, 576, 1])
    [5, 4, 1]
    """
    found, left = [0] * len(tokens), min(keep, sum(tokens))
    while left:
        views = [view for view, count in enumerate(tokens) if found[view] < count]
        share = max(left // len(views), 1)
        for view in views[:left]:
            more = min(share, tokens[view] - found[view])
            found[view], left = found[view] + more, left - more
    return found


def best_rows(scores: Tensor, shows: Tensor, keep: int) -> Tensor:
    """Of the rows that show an image, those that stay, in order.

    Parameters
    ----------
    scores : float32 [V, N], of the tokens in each of its views
    shows : int64 [R], on the CPU
        The token that each row shows, counted over all views; -1 for a row that shows none, as
        `image_newline`. Tokens that no row shows do not compete.
    keep : int, at most R
        Rows that show no token stay only when there are not enough others.

    Returns
    -------
    int64 [keep], on the device of the scores: `shows` of the rows that stay
    """
    views, width = scores.shape
    shown = shows[shows >= 0]
    tokens = torch.bincount(shown // width, minlength=views).tolist()
    candidates = torch.zeros(views, width, dtype=torch.bool)
    candidates.view(-1)[shown] = True
    counts = shares(keep, tokens)
    device = scores.device
    selection = select_topk(
        scores,
        torch.tensor(counts, device=device),
        candidates=candidates.to(device),
        capacity=max(counts),
    )
    # Where there are fewer than `capacity`, a place behind all tokens; rows of none look there too.
    flat = selection.indices + width * torch.arange(views, device=device)[:, None]
    flat = torch.where(selection.indices < 0, views * width, flat).view(-1)
    chosen = scores.new_zeros(views * width + 1).index_fill_(0, flat, 1.0)
    chosen[-1] = 0.0
    shows = shows.to(device)
    rows = select_topk(chosen[shows][None], keep).indices[0]
    return shows[rows]
