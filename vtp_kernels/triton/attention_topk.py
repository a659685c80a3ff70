"""attention_topk: select_topk of attention_scores, bit for bit."""

from torch import Tensor

from .attention_scores import attention_scores
from .select_topk import select_topk


def attention_topk(
    query: Tensor,
    key: Tensor,
    k_per_row: Tensor | None,
    k: int,
    candidates: Tensor,
    valid: Tensor | None,
    query_positions: Tensor | None,
    query_valid: Tensor | None,
    lse: Tensor | None,
    scale: float,
    support: str,
    head_reduce: str,
    keep: Tensor | None,
    threshold: float | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    masks = (candidates, valid, query_positions, query_valid)
    scores = attention_scores(query, key, *masks, lse, scale, support, head_reduce)
    indices, counts = select_topk(scores, k_per_row, k, candidates, keep, threshold, capacity)
    return indices, counts, scores
