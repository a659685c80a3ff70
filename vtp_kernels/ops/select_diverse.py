"""select_diverse: greedy choice of rows that differ, by max-min distance or a determinant."""

import torch
from torch import Tensor

from vtp_kernels import reference
from vtp_kernels.selection import Selection

from . import _checks
from ._dispatch import choose, kernel, rowwise, score_dtype
from ._fakes import register_fake
from .select_topk import check_topk

RULES = ("maxmin", "dpp")
FARTHEST = "farthest"


def select_diverse(
    features: Tensor,
    k: int | Tensor,
    *,
    rule: str = "maxmin",
    relevance: Tensor | None = None,
    candidates: Tensor | None = None,
    keep: Tensor | None = None,
    first: str | int = FARTHEST,
    capacity: int | None = None,
    backend: str | None = None,
) -> Selection:
    """k candidates of each row of the batch that differ from each other, chosen one by one.

    What differs is told by the cosine of two feature rows, in float32 (float64 for float64
    features): their dot product over the root of the product of their squares, so equal rows have
    cosine 1 exactly. Rows are scaled by a power of two first: no finite row is too large or too
    small. A row of zeros has cosine 0 with every row, itself included. Equal values go to the
    smaller index.

    "maxmin" (DivPrune, arXiv 2503.02175): with distance 1 - cosine, always the candidate whose
    smallest distance to what is kept or chosen is largest. Where nothing is kept it begins with
    `first`.

    "dpp" (CDPruner, arXiv 2506.10967; greedy MAP of Chen et al. 2018): always the candidate that
    adds most to the determinant of L = diag(r) S diag(r) over what is kept or chosen, with the
    cosines S and the relevance r. A candidate of which no more is left than 1e-5 of its own
    r ** 2 is, but for rounding, a combination of those chosen, and no longer competes. Where none
    competes it stops, and `counts` says so.

    A row of features with NaN or an infinity is odd: it is no anchor for others. maxmin takes odd
    candidates last, in ascending order; dpp never takes one.

    The native kernels give the same bits on every run, for a row of the batch as for that row
    alone, whatever the number of threads.

    What ties exactly (copies of a row, cosines that are exact) falls as said: to the smaller index.
    What ties but for rounding may fall either way: with another backend, device, instruction set or
    dtype, and on a CPU with another k, keep or candidates, for few rows are chosen from products
    that are summed in another order than those that choose many. Then the picks that follow may
    differ, too. Ask for all rows you need at once, rather than for k and, later, for more.

    Args:
        features: float [B, N, C], C >= 1. Rows that are neither candidates nor kept are not read.
        k: how many candidates to take: an int of at most N, or int32/int64 [B] on the device of
            `features`, one per row, read without a sync; a negative entry counts as 0. Where there
            are fewer candidates all are taken.
        rule: "maxmin" or "dpp".
        relevance: float [B, N], r of "dpp"; its sign does not matter. Read where a row competes,
            and must be finite there; a candidate of relevance 0 is never taken. None: all 1.
        candidates: bool [B, N], the rows that compete. None: all.
        keep: bool [B, N], rows that stay and count as chosen from the start. They do not compete
            and are not counted in k. "dpp" takes them in ascending order, whatever their relevance.
        first: what "maxmin" begins with where nothing is kept: "farthest", the candidate whose
            nearest other candidate is farthest, or the index of a candidate.
        capacity: K, the width of the result; needed when k is a tensor. Default: N with `keep`,
            else k. A row that needs more keeps its first `capacity`, kept rows (in ascending order)
            before those chosen.
        backend: "native", "reference" or None for the fastest that can serve.

    Returns:
        Selection(indices int64 [B, K] ascending, tail -1; counts int32 [B]).

    Raises:
        ValueError: shapes or devices that do not fit, k < 0 or k > N, capacity < 0, k a tensor and
            no capacity, an unknown rule, relevance without "dpp" or `first` with it, relevance that
            is not finite where a row competes, `first` that is no candidate of a row that has
            candidates and keeps nothing, and no candidates in any row where an int k asks for some.
            The last three are checked on the CPU, on a GPU only in debug mode: else such a
            candidate is odd, such a row begins with the farthest, and nothing is chosen.
        TypeError: a dtype that is not supported.
        NotImplementedError: features that require grad, a backend that cannot serve.
    """
    any_ = _checks.ANY
    _checks.tensor("features", features, "B, N, C", (any_, any_, any_))
    batch, length, channels = features.shape
    if channels == 0:
        raise ValueError("features must have at least 1 channel, got 0")
    if candidates is not None:
        _checks.tensor(
            "candidates", candidates, "B, N", (batch, length), _checks.BOOL, features.device
        )
    k_per_row, k, _, capacity = check_topk(k, keep, None, capacity, batch, length, features.device)
    if k > length:
        raise ValueError(f"k must be at most N = {length}, got {k}")
    _checks.one_of("rule", rule, RULES)
    _check_candidates(candidates, k, features)
    _check_relevance(relevance, rule, candidates, keep, features)
    first = _checked_first(first, rule, candidates, keep, features)
    inputs = (features,) if relevance is None else (features, relevance)
    _checks.inference_only("select_diverse", *inputs)
    backend = choose("select_diverse", features, backend)
    if relevance is not None:
        relevance = relevance.to(score_dtype(features))
    if backend != "reference":
        return Selection(
            *kernel("select_diverse", backend)(
                rowwise(features),
                rowwise(k_per_row),
                k,
                rule,
                rowwise(relevance),
                rowwise(candidates),
                rowwise(keep),
                -1 if first == FARTHEST else first,
                capacity,
            )
        )
    return reference.select_diverse(
        features,
        k if k_per_row is None else k_per_row,
        rule=rule,
        relevance=relevance,
        candidates=candidates,
        keep=keep,
        first=first,
        capacity=capacity,
    )


def _check_candidates(candidates: Tensor | None, k: int, features: Tensor) -> None:
    """A row of the batch may have none, but not all of them where some are asked for."""
    if candidates is None or k == 0 or candidates.numel() == 0:
        return
    if _checks.may_read(features) and not bool(candidates.any()):
        raise ValueError(f"candidates must name some, for k is {k}; no row of the batch has any")


def _check_relevance(
    relevance: Tensor | None,
    rule: str,
    candidates: Tensor | None,
    keep: Tensor | None,
    features: Tensor,
) -> None:
    if relevance is None:
        return
    if rule != "dpp":
        raise ValueError(f"relevance is for rule 'dpp', got one with rule {rule!r}")
    _checks.tensor("relevance", relevance, "B, N", features.shape[:2], device=features.device)
    if not _checks.may_read(features):
        return
    odd = reference.competing(candidates, keep, features)
    odd &= ~relevance.detach().to(score_dtype(features)).isfinite()
    if bool(odd.any()):
        raise ValueError(
            f"relevance must be finite in {score_dtype(features)} where a row competes, "
            f"got {relevance[odd][0].item()} at {odd.nonzero()[0].tolist()}"
        )


def _checked_first(
    first: str | int,
    rule: str,
    candidates: Tensor | None,
    keep: Tensor | None,
    features: Tensor,
) -> str | int:
    """`first`, or FARTHEST where there are no rows to begin with."""
    if first == FARTHEST:
        return first
    if rule == "dpp":
        raise ValueError(f"first is for rule 'maxmin', got {first!r} with rule 'dpp'")
    if isinstance(first, str):
        raise ValueError(f"first must be 'farthest' or an index, got {first!r}")
    _checks.integer("first", first, 0)
    length = features.shape[1]
    if length == 0:
        return FARTHEST
    if first >= length:
        raise ValueError(f"first must be less than N = {length}, got {first}")
    if _checks.may_read(features):
        competing = reference.competing(candidates, keep, features)
        begins = competing.any(1)
        if keep is not None:
            begins &= ~(keep.view(torch.uint8) != 0).any(1)
        lacks = begins & ~competing[:, first]
        if bool(lacks.any()):
            raise ValueError(
                f"first must be a candidate of every row that has any and keeps nothing, "
                f"got {first}, which row {lacks.nonzero()[0].item()} has not"
            )
    return first


@register_fake("select_diverse")
def _(features, k_per_row, k, rule, relevance, candidates, keep, first, capacity):
    batch = features.shape[0]
    return (
        features.new_empty(batch, capacity, dtype=torch.int64),
        features.new_empty(batch, dtype=torch.int32),
    )
