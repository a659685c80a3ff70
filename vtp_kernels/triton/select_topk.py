"""select_topk: one program a row, which sweeps over it six times, a block of tokens at a time.

The first sweep counts. Four sweeps narrow down the key of the last token taken, eight bits each by
a histogram. The last one writes the tokens above it in order, and of those equal to it the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtp_kernels.triton.order import ABSENT, KEPT, sortable
from vtp_kernels.triton.tuning import size_class, tuned


@triton.jit
def _keys(scores, candidates, keep, threshold, token, size, kept_compete):
    """Keys (order.py) of a row's tokens, ABSENT past its end. The three pointers, all but the first
    of which may be None, are to the row. Either the candidates compete or the kept tokens do."""
    inside = token < size
    score = tl.load(scores + token, mask=inside, other=0.0).to(tl.float32)
    competes = inside
    if candidates is not None:
        competes &= tl.load(candidates + token, mask=inside, other=0) != 0
    if threshold is not None:
        competes &= score > threshold
    key = sortable(score)
    if keep is not None:
        kept = inside & (tl.load(keep + token, mask=inside, other=0) != 0)
        competes = tl.where(kept_compete, kept, competes)
        key = tl.where(kept & (not kept_compete), KEPT, tl.where(competes, key, ABSENT))
    else:
        key = tl.where(competes, key, ABSENT)
    return key


@triton.jit
def _census(scores, candidates, keep, threshold, size, BLOCK: tl.constexpr):
    """How many tokens of a row compete, and how many are kept."""
    competing = 0
    kept = 0
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _keys(scores, candidates, keep, threshold, token, size, False)
        kept += tl.sum((key == KEPT).to(tl.int32))
        competing += tl.sum(((key != KEPT) & (key != ABSENT)).to(tl.int32))
    return competing, kept


@triton.jit
def _find_cut(scores, candidates, keep, threshold, size, kept_compete, need, BLOCK: tl.constexpr):
    """The need-th largest key, need > 0, of those that compete."""
    bins = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)  # the bits that are known
    known = tl.full([], 0, tl.uint32)  # which ones these are
    for digit in range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
            counts = (key != ABSENT) & (key != KEPT) & ((key & known) == prefix)
            bin = ((key >> shift) & 255).to(tl.int32)
            histogram += tl.histogram(bin, 256, mask=counts)
        at_least = tl.cumsum(histogram, reverse=True)
        bin = tl.sum((at_least >= need).to(tl.int32)) - 1
        need -= tl.sum(tl.where(bins > bin, histogram, 0))
        prefix |= bin.to(tl.uint32) << shift
        known |= tl.full([], 255, tl.uint32) << shift
    return prefix


@triton.jit
def _emit(
    scores, candidates, keep, threshold, size, kept_compete, cut, count, indices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes `count` tokens, ascending: those with keys above the cut, and of those equal to it the
    first ones."""
    above = 0
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
        above += tl.sum((key > cut).to(tl.int32))
    ties = count - above
    above = 0
    equal = 0
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
        is_above = (key > cut).to(tl.int32)
        is_equal = (key == cut).to(tl.int32)
        rank = equal + tl.cumsum(is_equal) - is_equal  # among those equal to the cut
        place = above + tl.cumsum(is_above) - is_above + tl.minimum(rank, ties)
        taken = (is_above != 0) | ((is_equal != 0) & (rank < ties))
        tl.store(indices + place, token.to(tl.int64), mask=taken)
        above += tl.sum(is_above)
        equal += tl.sum(is_equal)


@tuned(
    [
        triton.Config({"BLOCK": 4096}, num_warps=16),
        triton.Config({"BLOCK": 2048}, num_warps=8),
        triton.Config({"BLOCK": 1024}, num_warps=4),
        triton.Config({"BLOCK": 512}, num_warps=4),
    ],
    key=["size_class"],
)
@triton.jit(do_not_specialize=["size", "k", "capacity", "size_class"])
def _select(
    scores, scores_stride, candidates, candidates_stride, keep, keep_stride, k_per_row, threshold,
    size, k, capacity, indices, counts, size_class, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_stride
    indices += row * capacity
    if candidates is not None:
        candidates += row * candidates_stride
    if keep is not None:
        keep += row * keep_stride
    if k_per_row is not None:
        k = tl.load(k_per_row + row)
    competing, kept = _census(scores, candidates, keep, threshold, size, BLOCK)
    kept_compete = kept > capacity  # then the others have no chance
    need = tl.minimum(tl.maximum(k, 0), tl.minimum(competing, capacity - kept)).to(tl.int32)
    need = tl.where(kept_compete, capacity, need)
    count = tl.where(kept_compete, 0, kept) + need
    tl.store(counts + row, count)
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(
            indices + place,
            tl.full([BLOCK], -1, tl.int64),
            mask=(place >= count) & (place < capacity),
        )
    cut = KEPT - 1
    if need > 0:
        cut = _find_cut(scores, candidates, keep, threshold, size, kept_compete, need, BLOCK)
    if count > 0:
        _emit(scores, candidates, keep, threshold, size, kept_compete, cut, count, indices, BLOCK)


def select_topk(
    scores: Tensor,
    k_per_row: Tensor | None,
    k: int,
    candidates: Tensor | None,
    keep: Tensor | None,
    threshold: float | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    batch, size = scores.shape
    indices = scores.new_empty(batch, capacity, dtype=torch.int64)
    counts = scores.new_empty(batch, dtype=torch.int32)
    if batch > 0:
        _select[(batch,)](
            scores,
            scores.stride(0),
            candidates,
            0 if candidates is None else candidates.stride(0),
            keep,
            0 if keep is None else keep.stride(0),
            k_per_row,
            threshold,
            size,
            min(k, size),
            capacity,
            indices,
            counts,
            size_class=size_class(size),
        )
    return indices, counts
