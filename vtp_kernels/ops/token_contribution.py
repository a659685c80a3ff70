"""token_contribution: what each token adds to the attention output of one row."""

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise, score_dtype
from ._fakes import register_fake


def token_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How far each candidate turns, and how much it adds to, the attention output of one row.

    With a = softmax over the valid keys, c_j = concat_h a[h, j] v[h, j] and o = sum_j c_j (heads
    concatenated, before the output projection): cosine_j = cos(o - c_j, o), norm_j = ||c_j||. The
    middle stage of VisiPruner (arXiv 2510.17205) decides by both.

    A token that contributes nothing has cosine 1. One that is the whole output has cosine 0:
    nothing is left to compare.

    Args:
        query: float [B, Hq, D], one row per sequence, for example the last prompt token.
        key, value: float [B, Hkv, S, D] of the same dtype; Hq is a multiple of Hkv.
        candidates: bool [B, S], the tokens of interest.
        valid: bool [B, S], False for padding, which nobody attends to. None: all are valid.
        scale: factor on the logits. None: D ** -0.5.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        (cosine, norm), float32 [B, S] each (float64 for float64 inputs); 1 and 0 off the
        candidates.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not supported.
        NotImplementedError: D > 256, inputs that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("query", query, "B, Hq, D", (any_, any_, any_))
    batch, _, dim = query.shape
    device = query.device
    _checks.tensor("key", key, "B, Hkv, S, D", (batch, any_, any_, dim), device=device)
    _checks.same_dtype("key", key, "query", query)
    _checks.tensor("value", value, "B, Hkv, S, D", tuple(key.shape), device=device)
    _checks.same_dtype("value", value, "query", query)
    _checks.heads(query, key)
    length = key.shape[2]
    _checks.tensor("candidates", candidates, "B, S", (batch, length), _checks.BOOL, device)
    if valid is not None:
        _checks.tensor("valid", valid, "B, S", (batch, length), _checks.BOOL, device)
    _checks.inference_only("token_contribution", query, key, value)
    scale = _checks.scale(scale, dim)
    backend = choose("token_contribution", query, backend)
    if backend != "reference":
        return kernel("token_contribution", backend)(
            rowwise(query),
            rowwise(key),
            rowwise(value),
            rowwise(candidates),
            rowwise(valid),
            scale,
        )
    return reference.token_contribution(
        query, key, value, candidates=candidates, valid=valid, scale=scale
    )


@register_fake("token_contribution")
def _(query, key, value, candidates, valid, scale):
    shape, dtype = candidates.shape, score_dtype(query)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)
