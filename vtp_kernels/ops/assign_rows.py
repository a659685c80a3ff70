"""assign_rows: which of some chosen rows each row is most like."""

from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake


def assign_rows(
    keys: Tensor,
    targets: Tensor,
    *,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The target of largest cosine for every candidate row: the first half of merging tokens.

    The assignment of VisionZip's contextual tokens (arXiv 2412.04467) and of ToMe's bipartite
    matching (arXiv 2210.09461). `merge_rows` takes what comes of it.

    Args:
        keys: float [B, N, D], what rows are compared by.
        targets: int64 [B, T], the rows to assign to, in any order, none twice; -1 for padding. The
            indices of a Selection fit.
        candidates: bool [B, N], the rows to assign. None: all.
        backend: "native", "triton", "reference" or None for the fastest that can serve. Triton has
            no kernel for this op: on a GPU without a native kernel the reference serves.

    Returns:
        int64 [B, N], positions in `targets`. Equal cosines go to the smaller position; a row of
        zeros has cosine 0. A target has its own position, candidate or not. -1 for rows that are
        no candidates, for rows with anything that is not finite, and where no target is finite.
        Products and norms are float32 (float64 for float64 keys): a row whose sum of squares is
        beyond it counts as not finite, and a target whose squares all vanish in it as zero.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU, and on a GPU after
            `vtp_kernels.debug(True)`, also targets out of range or named twice (unseen, the first
            are ignored, and a row named twice has one of its positions).
        TypeError: a dtype that is not supported.
        NotImplementedError: keys that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("keys", keys, "B, N, D", (any_, any_, any_))
    batch, length, _ = keys.shape
    device = keys.device
    _checks.tensor("targets", targets, "B, T", (batch, any_), _checks.INT64, device)
    if candidates is not None:
        _checks.tensor("candidates", candidates, "B, N", (batch, length), _checks.BOOL, device)
    _checks.inference_only("assign_rows", keys)
    backend = choose("assign_rows", keys, backend)
    if _checks.must_read(targets, backend):
        _checks.distinct_rows("targets", targets, length)
    if backend == "reference":
        return reference.assign_rows(keys, targets, candidates=candidates)
    try:
        return kernel("assign_rows", backend)(rowwise(keys), rowwise(targets), rowwise(candidates))
    except RuntimeError:
        if _checks.may_read(targets):
            _checks.distinct_rows("targets", targets, length)
        raise


@register_fake("assign_rows")
def _(keys, targets, candidates):
    return targets.new_empty(keys.shape[:2])
