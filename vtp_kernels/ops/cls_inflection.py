"""cls_inflection: keep the tokens whose similarity to CLS stands out."""

from torch import Tensor

from vtp_kernels import reference
from vtp_kernels.selection import Selection

from . import _checks
from ._dispatch import choose, kernel, rowwise, score_dtype
from ._fakes import register_fake
from .inflection import check_rule, fake_selection


def cls_inflection(
    features: Tensor,
    cls: Tensor,
    *,
    rule: str = "chord",
    min_keep: int = 1,
    max_keep: int | None = None,
    clip_quantile: float = 0.995,
    sensitivity: float = 1.0,
    mass: float = 0.9,
    backend: str | None = None,
) -> tuple[Selection, Tensor]:
    """Cosine similarity of every token to CLS, and the tokens up to the knee of its sorted curve.

    Our reading of stage 1 of arXiv 2409.01162, whose exact rule is not public. Equal to
    `inflection(similarity, ...)` of the same backend, bit for bit; see there for the options.

    Args:
        features: float [B, N, C], the patch tokens.
        cls: float [B, C] of the same dtype, the CLS token or its stand-in.
        rule, min_keep, max_keep, clip_quantile, sensitivity, mass: as for `inflection`.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        (Selection(indices int64 [B, K], counts int32 [B]), similarity float32 [B, N]; float64 for
        float64 inputs). A zero vector has similarity 0.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown rule, an option out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: inputs that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("features", features, "B, N, C", (any_, any_, any_))
    batch, _, channels = features.shape
    _checks.tensor("cls", cls, "B, C", (batch, channels), device=features.device)
    _checks.same_dtype("cls", cls, "features", features)
    check_rule(rule, min_keep, max_keep, clip_quantile, sensitivity, mass)
    _checks.inference_only("cls_inflection", features, cls)
    backend = choose("cls_inflection", features, backend)
    if backend != "reference":
        indices, counts, similarity = kernel("cls_inflection", backend)(
            rowwise(features),
            rowwise(cls),
            rule,
            min_keep,
            max_keep,
            clip_quantile,
            sensitivity,
            mass,
        )
        return Selection(indices, counts), similarity
    return reference.cls_inflection(
        features,
        cls,
        rule=rule,
        min_keep=min_keep,
        max_keep=max_keep,
        clip_quantile=clip_quantile,
        sensitivity=sensitivity,
        mass=mass,
    )


@register_fake("cls_inflection")
def _(features, cls, rule, min_keep, max_keep, clip_quantile, sensitivity, mass):
    batch, length, _ = features.shape
    similarity = features.new_empty(batch, length, dtype=score_dtype(features))
    return (*fake_selection(features, length, max_keep), similarity)
