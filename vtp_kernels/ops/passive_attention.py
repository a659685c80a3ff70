"""passive_attention: causal attention in which text gives no weight to visual keys."""

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake

SINKS = ("merge", "drop")
VISUAL_ROWS = ("prefix", "causal", "skip")


def passive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visual: Tensor,
    valid: Tensor | None = None,
    sink: str = "merge",
    visual_rows: str = "prefix",
    renormalize: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention with visual tokens as passive sinks: the shallow stage of VisiPruner.

    Text rows take nothing from visual keys, or all their visual mass from the first visual key
    alone (arXiv 2510.17205; the arithmetic is that of the public code, on post-softmax weights).

    Args:
        query: float [B, Hq, S, D], already rotated; row s attends to keys <= s.
        key, value: float [B, Hkv, S, D] of the same dtype; Hq is a multiple of Hkv.
        visual: bool [B, S], which tokens are visual.
        valid: bool [B, S], False for padding: never attended to, its own rows output 0. None: all.
        sink: what becomes of the weight text rows give to visual keys. "merge": it moves to the
            first visual key of the sequence (of any image); "drop": it is lost.
        visual_rows: "prefix": visual rows attend to earlier non-visual keys alone, not even to
            themselves; "causal": they attend as usual; "skip": they output 0.
        renormalize: False: removed keys stay in the softmax denominator, as in the public code.
            True: softmax over the keys that remain; under "merge" the first visual key remains with
            its own logit and the other visual keys are not read.
        scale: factor on the logits. None: D ** -0.5.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        [B, Hq, S, D] in the dtype of `query`; 0 in rows with nothing to attend to.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown option.
        TypeError: a dtype that is not supported.
        NotImplementedError: D > 256, inputs that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("query", query, "B, Hq, S, D", (any_, any_, any_, any_))
    batch, _, length, dim = query.shape
    device = query.device
    _checks.tensor("key", key, "B, Hkv, S, D", (batch, any_, length, dim), device=device)
    _checks.same_dtype("key", key, "query", query)
    _checks.tensor("value", value, "B, Hkv, S, D", tuple(key.shape), device=device)
    _checks.same_dtype("value", value, "query", query)
    _checks.heads(query, key)
    _checks.tensor("visual", visual, "B, S", (batch, length), _checks.BOOL, device)
    if valid is not None:
        _checks.tensor("valid", valid, "B, S", (batch, length), _checks.BOOL, device)
    _checks.one_of("sink", sink, SINKS)
    _checks.one_of("visual_rows", visual_rows, VISUAL_ROWS)
    _checks.inference_only("passive_attention", query, key, value)
    scale = _checks.scale(scale, dim)
    backend = choose("passive_attention", query, backend)
    if backend != "reference":
        return kernel("passive_attention", backend)(
            rowwise(query),
            rowwise(key),
            rowwise(value),
            rowwise(visual),
            rowwise(valid),
            sink,
            visual_rows,
            renormalize,
            scale,
        )
    return reference.passive_attention(
        query,
        key,
        value,
        visual=visual,
        valid=valid,
        sink=sink,
        visual_rows=visual_rows,
        renormalize=renormalize,
        scale=scale,
    )


@register_fake("passive_attention")
def _(query, key, value, visual, valid, sink, visual_rows, renormalize, scale):
    return query.new_empty(query.shape)
