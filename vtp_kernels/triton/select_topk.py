"""select_topk: one program a row.

The key (order.py) of the last token taken is found bit by bit, from the highest one down: a bit is
set if as many keys as are taken are no smaller with it. These are counted in registers; very long
rows are read anew for every bit. Then tokens above that key are written in order, and of those
equal to it the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .order import ABSENT, KEPT, sortable
from .tuning import INTERPRETED, size_class

LARGEST_BLOCK = 4096  # ranks within a block are to fit into 16 bits
MOST_HELD = 4096 if INTERPRETED else 16384  # 32 keys of a thread; tests have longer rows


@triton.jit
def _keys(scores, candidates, keep, threshold, token, size, kept_compete):
    """Keys of a row's tokens, ABSENT past its end. The three pointers, all but the first of which
    may be None, are to the row. Either the candidates compete or the kept tokens do."""
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
def _count_from(
    bound, held, scores, candidates, keep, threshold, size, kept_compete, BLOCK: tl.constexpr
):  # fmt: skip
    """How many keys are not below `bound`: of those held, or of the row."""
    if held is not None:
        count = tl.sum((held >= bound).to(tl.int32))
    else:
        count = 0
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
            count += tl.sum((key >= bound).to(tl.int32))
    return count


@triton.jit
def _find_cut(
    count, held, scores, candidates, keep, threshold, size, kept_compete, BLOCK: tl.constexpr
):  # fmt: skip
    """The count-th largest key, and how many are above it. None is above what is returned for 0."""
    cut = tl.full([], 0, tl.uint32)
    above = 0
    for i in range(32):
        bound = cut | (tl.full([], 0x80000000, tl.uint32) >> i)
        not_below = _count_from(
            bound, held, scores, candidates, keep, threshold, size, kept_compete, BLOCK
        )
        if not_below >= count:
            cut = bound
        else:
            above = not_below  # in the end of cut + 1
    return cut, above


@triton.jit
def _emit(
    cut, ties, scores, candidates, keep, threshold, size, kept_compete, indices, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the tokens above the cut and the first `ties` of those equal to it, ascending."""
    above = 0
    equal = 0
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
        is_above = (key > cut).to(tl.int32)
        is_equal = (key == cut).to(tl.int32)
        both = (is_above << 16) + is_equal  # counted at once
        before = tl.cumsum(both) - both
        rank = equal + (before & 0xFFFF)  # among those equal to the cut
        place = above + (before >> 16) + tl.minimum(rank, ties)
        taken = (is_above != 0) | ((is_equal != 0) & (rank < ties))
        tl.store(indices + place, token.to(tl.int64), mask=taken)
        total = tl.sum(both)
        above += total >> 16
        equal += total & 0xFFFF


@triton.jit(
    do_not_specialize=[
        *("scores_stride", "candidates_stride", "keep_stride", "size", "k", "capacity"),
    ]
)
def _select(
    scores, scores_stride, candidates, candidates_stride, keep, keep_stride, k_per_row, threshold,
    size, k, capacity, indices, counts, HELD: tl.constexpr, BLOCK: tl.constexpr,
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
    others = tl.minimum(tl.maximum(k, 0), tl.minimum(competing, capacity - kept))
    count = tl.where(kept_compete, capacity, kept + others).to(tl.int32)
    tl.store(counts + row, count)
    for start in range(count, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(indices + place, tl.full([BLOCK], -1, tl.int64), mask=place < capacity)
    held = None
    if HELD > 0:
        token = tl.arange(0, HELD)
        held = _keys(scores, candidates, keep, threshold, token, size, kept_compete)
    cut, above = _find_cut(
        count, held, scores, candidates, keep, threshold, size, kept_compete, BLOCK
    )
    _emit(
        cut, count - above,
        scores, candidates, keep, threshold, size, kept_compete, indices, BLOCK,
    )  # fmt: skip


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
        held = max(size_class(size), 256)
        block = min(held, LARGEST_BLOCK)
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
            HELD=held if held <= MOST_HELD else 0,
            BLOCK=block,
            num_warps=max(block // 256, 2),
        )
    return indices, counts
