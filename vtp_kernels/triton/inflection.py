"""inflection: the knee of every row's sorted curve.

Scores become integer keys (order.py), PyTorch sorts these, and one program a row seeks the knee and
writes the tokens in order. The rules are those of vtp_kernels/reference.py: the same float64
operations in the same order, each rounded once (nothing is fused), so that the kept sets are equal
bit for bit. What runs side by side here is order-free or exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .order import sortable
from .tuning import size_class, tuned

NO_RANK = tl.constexpr(0x7FFFFFFF)
INFINITY_KEY = tl.constexpr(0x7F800000)
MINUS_INFINITY_KEY = tl.constexpr(-0x7F800001)


# --- keys -------------------------------------------------------------------------------------


@triton.jit
def signed_key(score):
    """int32 keys in the order of order.py: what PyTorch can sort."""
    return (sortable(score) ^ 0x80000000).to(tl.int32, bitcast=True)


@triton.jit
def _score_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["parts"])
def _make_keys(curve, curve_stride, size, parts, keys, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    token = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    score = tl.load(curve + row * curve_stride + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(keys + row * size + token, signed_key(score), mask=inside)


# --- rules ------------------------------------------------------------------------------------
#
# `run` points to the keys of the finite scores of a row, descending: y_0 ... y_{n-1}, n >= 3, which
# count as at most `limit`. A rule gives the rank of the knee, or -1.


@triton.jit
def _scores(run, n, limit, rank):
    """y at `rank`, and 0 past the end."""
    key = tl.load(run + rank, mask=rank < n, other=0)
    return tl.minimum(_score_of(key).to(tl.float64), limit)


@triton.jit
def _quantile(run, n, q):
    unlimited = tl.full([], float("inf"), tl.float64)
    position = (n - 1).to(tl.float64) * q
    below = position.to(tl.int32)  # the floor of what is not negative
    t = position - below.to(tl.float64)
    low = _scores(run, n, unlimited, n - 1 - below)
    high = _scores(run, n, unlimited, tl.maximum(n - 2 - below, 0))
    step = high - low
    return tl.where(t < 0.5, low + step * t, high - step * (1.0 - t))


@triton.jit
def _chord(run, n, limit, epsilon, BLOCK: tl.constexpr):
    """The rank farthest below the chord through both ends, the first of equals."""
    last = (n - 1).to(tl.float64)
    top = _scores(run, n, limit, 0)
    bottom = _scores(run, n, limit, n - 1)
    whole_drop = top - bottom
    noise = epsilon * tl.maximum(tl.abs(top), tl.abs(bottom)) * last
    farthest = tl.zeros([BLOCK], tl.float64) + noise  # nearer is rounding
    farthest_rank = tl.full([BLOCK], NO_RANK, tl.int32)
    for start in range(0, n, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        drop = (top - _scores(run, n, limit, rank)) * last
        distance = drop - rank.to(tl.float64) * whole_drop
        farther = (rank < n) & (distance > farthest)
        farthest = tl.where(farther, distance, farthest)
        farthest_rank = tl.where(farther, rank, farthest_rank)
    first = tl.min(tl.where(farthest == tl.max(farthest), farthest_rank, NO_RANK))
    return tl.where(first == NO_RANK, -1, first)


@triton.jit
def _store_differences(run, n, limit, differences, BLOCK: tl.constexpr):
    """How far the curve is below its chord, at every rank."""
    last = (n - 1).to(tl.float64)
    low = _scores(run, n, limit, n - 1)
    height = _scores(run, n, limit, 0) - low
    for start in range(0, n, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        share = (_scores(run, n, limit, rank) - low) / height
        difference = (1.0 - share) - rank.to(tl.float64) / last
        tl.store(differences + rank, difference, mask=rank < n)


@triton.jit
def _list_extremes(n, differences, extremes, BLOCK: tl.constexpr):
    """Writes the ranks of minima and maxima, ascending; the ends are among them. Returns how many
    there are."""
    count = 0
    for start in range(0, n, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        inside = rank < n
        before = tl.load(differences + tl.maximum(rank - 1, 0), mask=inside, other=0.0)
        here = tl.load(differences + rank, mask=inside, other=0.0)
        after = tl.load(differences + tl.minimum(rank + 1, n - 1), mask=inside, other=0.0)
        rises = (here > before) & (here < after)
        falls = (here < before) & (here > after)
        is_extreme = (inside & ~rises & ~falls).to(tl.int32)
        place = count + tl.cumsum(is_extreme) - is_extreme
        tl.store(extremes + place, rank, mask=is_extreme != 0)
        count += tl.sum(is_extreme)
    return count


@triton.jit
def _kneedle(run, n, limit, sensitivity, differences, extremes, BLOCK: tl.constexpr):
    """The first extreme that the next one is far enough below.

    The walk of the definition is armed by a maximum until the next extreme, and between extremes
    the differences only rise or only fall. So a maximum fires if the next extreme is below its
    threshold, and after a minimum none is.
    """
    _store_differences(run, n, limit, differences, BLOCK)
    tl.debug_barrier()  # other threads read what a thread has stored, here and below
    count = _list_extremes(n, differences, extremes, BLOCK)
    tl.debug_barrier()
    margin = sensitivity * (1.0 / (n - 1).to(tl.float64))
    knee = -1
    start = 0
    while (start < count - 1) & (knee < 0):
        at = start + tl.arange(0, BLOCK)
        inside = at < count - 1
        rank = tl.load(extremes + at, mask=inside, other=0)
        next_rank = tl.load(extremes + at + 1, mask=inside, other=0)
        here = tl.load(differences + rank, mask=inside, other=0.0)
        after = tl.load(differences + next_rank, mask=inside, other=0.0)
        fires = inside & (after < here - margin)
        first = tl.min(tl.where(fires, rank, NO_RANK))
        knee = tl.where(first == NO_RANK, -1, first)
        start += BLOCK
    return knee


@triton.jit
def _iqr(run, n, BLOCK: tl.constexpr):
    """The last rank of an outlier."""
    unlimited = tl.full([], float("inf"), tl.float64)
    q1 = _quantile(run, n, 0.25)
    q3 = _quantile(run, n, 0.75)
    fence = q3 + 1.5 * (q3 - q1)
    outliers = 0
    for start in range(0, n, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        is_outlier = (rank < n) & (_scores(run, n, unlimited, rank) > fence)
        outliers += tl.sum(is_outlier.to(tl.int32))
    return outliers - 1


@triton.jit
def _weights(run, n, rank):
    """Scores as summed by `mass`, and the sums up to which these are exact in any order.

    The positive scores down to `rank` are multiples of the last place of the one there, so a sum of
    them is exact while it is below 2^53 of those. The bound is half of that, which leaves room for
    the rounding of a sum that is not.
    """
    key = tl.load(run + rank, mask=rank < n, other=0)
    weight = tl.where(key > 0, _score_of(key), 0.0).to(tl.float64)
    exponent = tl.maximum(key >> 23, 1).to(tl.int64)  # 0 where subnormal, which counts as 1
    bound = ((exponent + 925) << 52).to(tl.float64, bitcast=True)
    return weight, bound


@triton.jit
def _total_weight(run, n, BLOCK: tl.constexpr):
    """The sum of all weights, how many are positive, and how many of these any order can sum."""
    exact = 0
    positive = 0
    total = tl.full([], 0.0, tl.float64)
    rounded = tl.full([], 0.0, tl.float64)  # a sum of all, in any order
    for start in range(0, n, BLOCK):
        weight, bound = _weights(run, n, start + tl.arange(0, BLOCK))
        is_exact = (weight > 0.0) & (rounded + tl.cumsum(weight) <= bound)
        exact += tl.sum(is_exact.to(tl.int32))
        positive += tl.sum((weight > 0.0).to(tl.int32))
        total += tl.sum(tl.where(is_exact, weight, 0.0))
        rounded += tl.sum(weight)
    for rank in range(exact, positive):
        total += _weights(run, n, rank)[0]
    return total, positive, exact


@triton.jit
def _mass(run, n, mass, BLOCK: tl.constexpr):
    """The rank that completes `mass` of the sum of all scores, added one after the other.

    Down to a score far smaller than the sum so far the order of the additions does not show, and
    blocks are summed side by side. The scores after that, often none, are added one by one.
    """
    total, positive, exact = _total_weight(run, n, BLOCK)
    target = mass * total
    held = tl.full([], 0.0, tl.float64)
    knee = -1
    start = 0
    while (start < exact) & (knee < 0):
        ranks = start + tl.arange(0, BLOCK)
        weight, _ = _weights(run, exact, ranks)
        holds = (ranks < exact) & (held + tl.cumsum(weight) >= target)
        first = tl.min(tl.where(holds, ranks, NO_RANK))
        knee = tl.where(first == NO_RANK, -1, first)
        held += tl.sum(weight)
        start += BLOCK
    rank = exact
    while (rank < positive) & (knee < 0):
        held += _weights(run, n, rank)[0]
        knee = tl.where(held >= target, rank, -1)
        rank += 1
    return knee


@triton.jit
def _find_knee(
    run, n, differences, extremes, epsilon, clip_quantile, sensitivity, mass,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    limit = tl.full([], float("inf"), tl.float64)
    if RULE == "chord" or RULE == "kneedle":
        limit = _quantile(run, n, clip_quantile)  # y_0 for 1.0: nothing is clipped
    knee = -1
    if _scores(run, n, limit, 0) > _scores(run, n, limit, n - 1):
        if RULE == "chord":
            knee = _chord(run, n, limit, epsilon, BLOCK)
        elif RULE == "kneedle":
            knee = _kneedle(run, n, limit, sensitivity, differences, extremes, BLOCK)
        elif RULE == "iqr":
            knee = _iqr(run, n, BLOCK)
        else:
            knee = _mass(run, n, mass, BLOCK)
    return knee


# --- rows -------------------------------------------------------------------------------------


@triton.jit
def _census(ranked, size, BLOCK: tl.constexpr):
    """How many scores of a row are +inf, and how many are finite."""
    infinite = 0
    finite = 0
    for start in range(0, size, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        key = tl.load(ranked + rank, mask=rank < size, other=MINUS_INFINITY_KEY)
        infinite += tl.sum((key == INFINITY_KEY).to(tl.int32))
        finite += tl.sum(((key < INFINITY_KEY) & (key > MINUS_INFINITY_KEY)).to(tl.int32))
    return infinite, finite


@triton.jit
def _emit(keys, ranked, size, count, indices, BLOCK: tl.constexpr):
    """Writes the first `count` > 0 tokens of the ranking, ascending: those with keys above the last
    one's, and of those equal to it the first."""
    cut = tl.load(ranked + count - 1)
    above = 0
    for start in range(0, count, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        key = tl.load(ranked + rank, mask=rank < count, other=cut)
        above += tl.sum((key > cut).to(tl.int32))
    ties = count - above
    above = 0
    equal = 0
    start = 0
    while (start < size) & (above + tl.minimum(equal, ties) < count):
        token = start + tl.arange(0, BLOCK)
        inside = token < size
        key = tl.load(keys + token, mask=inside, other=0)
        is_above = (inside & (key > cut)).to(tl.int32)
        is_equal = (inside & (key == cut)).to(tl.int32)
        earlier = equal + tl.cumsum(is_equal) - is_equal  # of those equal to the cut
        place = above + tl.cumsum(is_above) - is_above + tl.minimum(earlier, ties)
        taken = (is_above != 0) | ((is_equal != 0) & (earlier < ties))
        tl.store(indices + place, token.to(tl.int64), mask=taken)
        above += tl.sum(is_above)
        equal += tl.sum(is_equal)
        start += BLOCK


@tuned(
    [
        triton.Config({"BLOCK": 4096}, num_warps=16),
        triton.Config({"BLOCK": 2048}, num_warps=8),
        triton.Config({"BLOCK": 1024}, num_warps=8),
        triton.Config({"BLOCK": 512}, num_warps=4),
    ],
    key=["size_class", "RULE"],
)
@triton.jit(do_not_specialize=["size", "min_keep", "capacity", "size_class"])
def _inflect(
    keys, ranked, differences, extremes,
    epsilon: tl.float64, clip_quantile: tl.float64, sensitivity: tl.float64, mass: tl.float64,
    size, min_keep, capacity, indices, counts, size_class,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    keys += row * size
    ranked += row * size
    indices += row * capacity
    if differences is not None:
        differences += row * size
        extremes += row * size
    infinite, finite = _census(ranked, size, BLOCK)
    knee = -1
    if finite >= 3:
        knee = _find_knee(
            ranked + infinite,
            finite,
            differences,
            extremes,
            epsilon,
            clip_quantile,
            sensitivity,
            mass,
            RULE,
            BLOCK,
        )
    count = tl.where(knee < 0, size, infinite + knee + 1)
    count = tl.minimum(tl.maximum(count, min_keep), capacity)
    tl.store(counts + row, count)
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        past = (place >= count) & (place < capacity)
        tl.store(indices + place, tl.full([BLOCK], -1, tl.int64), mask=past)
    if count > 0:
        _emit(keys, ranked, size, count, indices, BLOCK)


def inflect(
    keys: Tensor,
    dtype: torch.dtype,
    rule: str,
    min_keep: int,
    max_keep: int | None,
    clip_quantile: float,
    sensitivity: float,
    mass: float,
) -> tuple[Tensor, Tensor]:
    """Indices and counts of rows given by their keys, int32 [B, N] without gaps, which were made of
    scores of `dtype`."""
    batch, size = keys.shape
    capacity = size if max_keep is None else min(max_keep, size)
    indices = keys.new_empty(batch, capacity, dtype=torch.int64)
    counts = keys.new_empty(batch, dtype=torch.int32)
    differences = extremes = None
    if rule == "kneedle":
        differences = keys.new_empty(batch, size, dtype=torch.float64)
        extremes = torch.empty_like(keys)
    if batch > 0:
        _inflect[(batch,)](
            keys,
            keys.sort(dim=1, descending=True).values,
            differences,
            extremes,
            torch.finfo(dtype).eps,
            clip_quantile,
            sensitivity,
            mass,
            size,
            min(min_keep, capacity),
            capacity,
            indices,
            counts,
            size_class(size),
            RULE=rule,
            enable_fp_fusion=False,
        )
    return indices, counts


def inflection(
    curve: Tensor,
    rule: str,
    min_keep: int,
    max_keep: int | None,
    clip_quantile: float,
    sensitivity: float,
    mass: float,
) -> tuple[Tensor, Tensor]:
    batch, size = curve.shape
    keys = curve.new_empty(batch, size, dtype=torch.int32)
    if keys.numel() > 0:
        block = 1024
        parts = triton.cdiv(size, block)
        _make_keys[(batch * parts,)](curve, curve.stride(0), size, parts, keys, BLOCK=block)
    options = (rule, min_keep, max_keep, clip_quantile, sensitivity, mass)
    return inflect(keys, curve.dtype, *options)
