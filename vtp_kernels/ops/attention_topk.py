"""attention_topk: attention_scores and select_topk in one call."""

import torch
from torch import Tensor

from vtp_kernels import reference
from vtp_kernels.selection import Selection

from . import _checks
from ._dispatch import choose, kernel, rowwise, score_dtype
from ._fakes import register_fake
from .attention_scores import check_attention
from .select_topk import check_topk


def attention_topk(
    query: Tensor,
    key: Tensor,
    k: int | Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_valid: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    support: str = "all",
    head_reduce: str = "mean",
    keep: Tensor | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[Selection, Tensor]:
    """The k candidates that receive most attention from the query rows, and all their scores.

    Equal to `select_topk(attention_scores(...), k, candidates=candidates, ...)` of the same
    backend, bit for bit. See `attention_scores` for query ... head_reduce, `select_topk` for k,
    keep, threshold and capacity, and both for what they raise. A candidate that is not `valid`
    competes with score 0.

    Returns:
        (Selection(indices int64 [B, K], counts int32 [B]), scores float32 [B, S]; float64 for
        float64 inputs).
    """
    check_attention(
        "attention_topk",
        query,
        key,
        candidates,
        valid,
        query_positions,
        query_valid,
        lse,
        support,
        head_reduce,
    )
    k_per_row, k, threshold, capacity = check_topk(
        k, keep, threshold, capacity, key.shape[0], key.shape[2], query.device
    )
    return run(
        query,
        key,
        k_per_row,
        k,
        candidates=candidates,
        valid=valid,
        query_positions=query_positions,
        query_valid=query_valid,
        lse=lse,
        scale=_checks.scale(scale, query.shape[-1]),
        support=support,
        head_reduce=head_reduce,
        keep=keep,
        threshold=threshold,
        capacity=capacity,
        backend=choose("attention_topk", query, backend),
    )


def run(
    query: Tensor,
    key: Tensor,
    k_per_row: Tensor | None,
    k: int,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_valid: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float,
    support: str = "all",
    head_reduce: str = "mean",
    keep: Tensor | None = None,
    threshold: float | None = None,
    capacity: int,
    backend: str,
) -> tuple[Selection, Tensor]:
    """`attention_topk` of arguments that are known to fit, on a backend that can serve them."""
    if backend != "reference":
        indices, counts, scores = kernel("attention_topk", backend)(
            rowwise(query),
            rowwise(key),
            rowwise(k_per_row),
            k,
            rowwise(candidates),
            rowwise(valid),
            rowwise(query_positions),
            rowwise(query_valid),
            rowwise(lse),
            scale,
            support,
            head_reduce,
            rowwise(keep),
            threshold,
            capacity,
        )
        return Selection(indices, counts), scores
    return reference.attention_topk(
        query,
        key,
        k if k_per_row is None else k_per_row,
        candidates=candidates,
        valid=valid,
        query_positions=query_positions,
        query_valid=query_valid,
        lse=lse,
        scale=scale,
        support=support,
        head_reduce=head_reduce,
        keep=keep,
        threshold=threshold,
        capacity=capacity,
    )


@register_fake("attention_topk")
def _(
    query,
    key,
    k_per_row,
    k,
    candidates,
    valid,
    query_positions,
    query_valid,
    lse,
    scale,
    support,
    head_reduce,
    keep,
    threshold,
    capacity,
):
    batch, length = candidates.shape
    return (
        query.new_empty(batch, capacity, dtype=torch.int64),
        query.new_empty(batch, dtype=torch.int32),
        query.new_empty(batch, length, dtype=score_dtype(query)),
    )
