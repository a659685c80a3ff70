"""merge_rows: rows merged into those they were assigned to."""

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import FLOATS, choose, kernel, rowwise, score_dtype
from ._fakes import register_fake

MODES = ("mean", "add_mean", "weighted")


def merge_rows(
    features: Tensor,
    assignment: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    mode: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Every target row, merged with the rows that are assigned to it.

    A target's own row belongs to its own group and to no other, whatever `assignment` says of it.
    Sums are float32 (float64 for float64 features) and go through a group in ascending order of
    rows: the same bits on every run, and for a sequence alone as in its batch.

    Args:
        features: float [B, N, C].
        assignment: int64 [B, N], positions in `targets`, as `assign_rows` gives them. Rows with a
            negative one are left out.
        targets: int64 [B, T], rows, in any order, none twice; -1 for padding.
        weights: float [B, N], finite and at least 0, for "weighted", which needs them.
        mode: "mean": over the group. "add_mean": the target plus the mean of the others
            (VisionZip, arXiv 2412.04467). "weighted": sum of w x over sum of w (PruMerge, arXiv
            2403.15388; ToMe, arXiv 2210.09461). Where there are no others, or the weights sum to
            0, the target stays as it is.
        backend: "native", "triton", "reference" or None for the fastest that can serve. Triton has
            no kernel for this op: on a GPU without a native kernel the reference serves.

    Returns:
        [B, T, C] in the dtype of `features`, 0 at padding. What is not finite in a row shows in the
        row of its own group alone.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown mode, weights without "weighted"
            or "weighted" without weights; on the CPU, and on a GPU after
            `vtp_kernels.debug(True)`, also positions of T and more, targets out of range or named
            twice, weights that are negative or not finite (unseen, rows with such a position are
            left out and such targets are padding).
        TypeError: a dtype that is not supported.
        NotImplementedError: inputs that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("features", features, "B, N, C", (any_, any_, any_))
    batch, length, _ = features.shape
    device = features.device
    _checks.tensor("assignment", assignment, "B, N", (batch, length), _checks.INT64, device)
    _checks.tensor("targets", targets, "B, T", (batch, any_), _checks.INT64, device)
    _checks.one_of("mode", mode, MODES)
    if weights is not None:
        _checks.tensor("weights", weights, "B, N", (batch, length), FLOATS, device)
    if (weights is None) == (mode == "weighted"):
        given = "None" if weights is None else "a tensor"
        raise ValueError(
            f'weights must be given with mode "weighted" and with no other, got {given} with '
            f"mode {mode!r}"
        )
    tracked = (features,) if weights is None else (features, weights)
    _checks.inference_only("merge_rows", *tracked)
    backend = choose("merge_rows", features, backend)
    if _checks.must_read(targets, backend):
        _check_values(assignment, targets, weights, length)
    if weights is not None:
        weights = weights.to(score_dtype(features))
    if backend == "reference":
        return reference.merge_rows(features, assignment, targets, weights=weights, mode=mode)
    try:
        return kernel("merge_rows", backend)(
            rowwise(features), rowwise(assignment), rowwise(targets), rowwise(weights), mode
        )
    except RuntimeError:
        if _checks.may_read(targets):
            _check_values(assignment, targets, weights, length)
        raise


def _check_values(assignment: Tensor, targets: Tensor, weights: Tensor | None, length: int) -> None:
    """Reads values."""
    _checks.distinct_rows("targets", targets, length)
    width = targets.shape[1]
    outside = assignment >= width
    if bool(outside.any()):
        raise ValueError(
            f"assignment must be below the {width} targets, got {assignment[outside][0].item()} "
            f"at {outside.nonzero()[0].tolist()}"
        )
    if weights is None:
        return
    bad = ~(weights.isfinite() & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"weights must be finite and at least 0, got {weights[bad][0].item()} "
            f"at {bad.nonzero()[0].tolist()}"
        )


@register_fake("merge_rows")
def _(features, assignment, targets, weights, mode):
    return features.new_empty(*targets.shape, features.shape[2])
