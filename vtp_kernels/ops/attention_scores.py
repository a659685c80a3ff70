"""attention_scores: the attention each candidate key receives, without the attention matrix."""

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise, score_dtype
from ._fakes import register_fake

SUPPORTS = ("all", "candidates")
HEAD_REDUCTIONS = ("mean", "max", "sum")


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_valid: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    support: str = "all",
    head_reduce: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Attention each candidate key receives from the query rows.

    Softmax weights, averaged over the valid query rows of a head, then reduced over the heads. A
    row that attends to nothing weighs 0 and counts in the mean; scores are never NaN for its sake.

    Args:
        query: float [B, Hq, M, D], already rotated.
        key: float [B, Hkv, S, D] of the same dtype; Hq is a multiple of Hkv.
        candidates: bool [B, S], the keys that are scored.
        valid: bool [B, S], False for padding, which nobody attends to. None: all are valid.
        query_positions: int64 [B, M]; row m attends to the keys s <= position. None: to all keys.
        query_valid: bool [B, M], the rows that count. None: all.
        lse: float32 [B, Hq, M], natural logarithm of the softmax denominator of each row over its
            attended keys, scaled logits, as FlashAttention returns it (-inf: attends to nothing).
            With it only candidate keys are read.
        scale: factor on the logits. None: D ** -0.5.
        support: "all": softmax over all attended keys; "candidates": over candidates alone.
        head_reduce: "mean", "max" or "sum" over the Hq heads.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        float32 [B, S] (float64 for float64 inputs), 0 at keys that are no candidates.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown option, `lse` (which fixes the
            denominator) together with support="candidates".
        TypeError: a dtype that is not supported.
        NotImplementedError: D > 256, inputs that require grad, a backend that cannot serve.
    """
    check_attention(
        "attention_scores",
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
    scale = _checks.scale(scale, query.shape[-1])
    backend = choose("attention_scores", query, backend)
    if backend != "reference":
        return kernel("attention_scores", backend)(
            rowwise(query),
            rowwise(key),
            rowwise(candidates),
            rowwise(valid),
            rowwise(query_positions),
            rowwise(query_valid),
            rowwise(lse),
            scale,
            support,
            head_reduce,
        )
    return reference.attention_scores(
        query,
        key,
        candidates=candidates,
        valid=valid,
        query_positions=query_positions,
        query_valid=query_valid,
        lse=lse,
        scale=scale,
        support=support,
        head_reduce=head_reduce,
    )


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    candidates: Tensor,
    valid: Tensor | None,
    query_positions: Tensor | None,
    query_valid: Tensor | None,
    lse: Tensor | None,
    support: str,
    head_reduce: str,
) -> None:
    any_ = _checks.ANY
    _checks.tensor("query", query, "B, Hq, M, D", (any_, any_, any_, any_))
    batch, heads, rows, dim = query.shape
    device = query.device
    _checks.tensor("key", key, "B, Hkv, S, D", (batch, any_, any_, dim), device=device)
    _checks.same_dtype("key", key, "query", query)
    _checks.heads(query, key)
    length = key.shape[2]
    _checks.tensor("candidates", candidates, "B, S", (batch, length), _checks.BOOL, device)
    if valid is not None:
        _checks.tensor("valid", valid, "B, S", (batch, length), _checks.BOOL, device)
    if query_positions is not None:
        _checks.tensor(
            "query_positions", query_positions, "B, M", (batch, rows), _checks.INT64, device
        )
    if query_valid is not None:
        _checks.tensor("query_valid", query_valid, "B, M", (batch, rows), _checks.BOOL, device)
    _checks.one_of("support", support, SUPPORTS)
    _checks.one_of("head_reduce", head_reduce, HEAD_REDUCTIONS)
    if lse is not None:
        dtype = (score_dtype(query),)
        _checks.tensor("lse", lse, "B, Hq, M", (batch, heads, rows), dtype, device)
        if support == "candidates":
            raise ValueError("lse must be None with support='candidates', got a tensor")
    _checks.inference_only(op, query, key)


@register_fake("attention_scores")
def _(
    query, key, candidates, valid, query_positions, query_valid, lse, scale, support, head_reduce
):
    return query.new_empty(key.shape[0], key.shape[2], dtype=score_dtype(query))
