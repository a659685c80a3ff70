"""select_topk: exact, deterministic top-k per row, indices in the original order."""

import torch
from torch import Tensor

from vtp_kernels import reference
from vtp_kernels.selection import Selection

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake


def select_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    candidates: Tensor | None = None,
    keep: Tensor | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
    backend: str | None = None,
) -> Selection:
    """The k best candidates of each row, and whatever must be kept.

    The selected set is that of a stable sort by (score descending, index ascending): equal scores
    go to the smaller index, NaN ranks below -inf, -0.0 equals +0.0. Same bits on every run.

    Args:
        scores: float [B, S].
        k: how many candidates to take: an int, or int32/int64 [B] on the device of `scores`, one
            per row, read without a sync; a negative entry counts as 0.
        candidates: bool [B, S], the tokens that compete. None: all.
        keep: bool [B, S], tokens that stay whatever their score (text). They do not compete and are
            not counted in k.
        threshold: only scores above it compete, compared in float32 (in float64 for float64
            scores); NaN never does then.
        capacity: K, the width of the result; needed when k is a tensor. Default: S with `keep`,
            else min(k, S). A row that needs more keeps its best `capacity`, kept tokens first.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        Selection(indices int64 [B, K] ascending, tail -1; counts int32 [B]).

    Raises:
        ValueError: shapes or devices that do not fit, k < 0, capacity < 0, k a tensor and no
            capacity.
        TypeError: a dtype that is not supported.
        NotImplementedError: scores that require grad, a backend that cannot serve.
    """
    _checks.tensor("scores", scores, "B, S", (_checks.ANY, _checks.ANY))
    batch, length = scores.shape
    if candidates is not None:
        _checks.tensor(
            "candidates", candidates, "B, S", (batch, length), _checks.BOOL, scores.device
        )
    k_per_row, k, threshold, capacity = check_topk(
        k, keep, threshold, capacity, batch, length, scores.device
    )
    _checks.inference_only("select_topk", scores)
    backend = choose("select_topk", scores, backend)
    if backend != "reference":
        return Selection(
            *kernel("select_topk", backend)(
                rowwise(scores),
                rowwise(k_per_row),
                k,
                rowwise(candidates),
                rowwise(keep),
                threshold,
                capacity,
            )
        )
    return reference.select_topk(
        scores,
        k if k_per_row is None else k_per_row,
        candidates=candidates,
        keep=keep,
        threshold=threshold,
        capacity=capacity,
    )


def check_topk(
    k: int | Tensor,
    keep: Tensor | None,
    threshold: float | None,
    capacity: int | None,
    batch: int,
    length: int,
    device: torch.device,
) -> tuple[Tensor | None, int, float | None, int]:
    """Checks the selection's arguments.

    Returns:
        (k per row or None, k or 0, threshold or None, capacity).
    """
    if keep is not None:
        _checks.tensor("keep", keep, "B, S", (batch, length), _checks.BOOL, device)
    if threshold is not None:
        _checks.number("threshold", threshold)
        threshold = float(threshold)
    if capacity is not None:
        _checks.integer("capacity", capacity, 0)
    if isinstance(k, Tensor):
        _checks.tensor("k", k, "B", (batch,), _checks.INTS, device)
        if capacity is None:
            raise ValueError("capacity must be given when k is a tensor, got None")
        return k, 0, threshold, capacity
    _checks.integer("k", k, 0)
    if capacity is None:
        capacity = min(k, length) if keep is None else length
    return None, k, threshold, capacity


@register_fake("select_topk")
def _(scores, k_per_row, k, candidates, keep, threshold, capacity):
    batch = scores.shape[0]
    return (
        scores.new_empty(batch, capacity, dtype=torch.int64),
        scores.new_empty(batch, dtype=torch.int32),
    )
