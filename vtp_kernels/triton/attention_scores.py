"""attention_scores without an attention matrix in memory, as csrc/attention_scores.cu does it.

A program of a pass holds a tile of keys and meets all query rows of the heads that share them, so a
pass reads K once. Which kernels run depends on the rows that share a key:

    log-sum-exp given     _columns                              _finish_columns
    up to FEW_ROWS        _statistics, which keeps its logits   _finish_rows
    more                  _statistics, _merge, _columns         _finish_columns

_statistics leaves the maximum and the sum of every row over a tile of keys; tiles are merged in
order. _columns, which knows the rows' softmax, adds up the weights of its keys over the rows.
Writing and reading back the logits of few rows moves no more than K itself does; more rows are
cheaper to compute twice.

Rows that share a key are numbered m * group + (head within the group), so that those of the query
rows m that attend to a tile are a range. Logits are in base 2: they carry log2(e).
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import INTERPRETED, tuned

LOG2_E = tl.constexpr(math.log2(math.e))
FEW_ROWS, MANY_ROWS = 16, 32  # query rows that a tile of keys is multiplied with at a time
KEY_BYTES = 32 * 1024  # of a tile of keys
FLOAT32_KEYS = 64  # of a tile
FLOAT32_CHUNK = 32  # elements multiplied at a time: without tensor cores they are in registers
MERGED_AT_ONCE = 16  # tiles of keys
FEW_TILES = 32  # are merged by whoever needs the softmax of a row
MERGE_ROWS = 64
FINISH_ROWS, FINISH_KEYS = 128, 32
if INTERPRETED:  # where an operation costs the same whatever its size
    MANY_ROWS, KEY_BYTES, FLOAT32_KEYS, FLOAT32_CHUNK = 64, 256 * 1024, 1024, 64
    MERGED_AT_ONCE, FEW_TILES, FINISH_KEYS = 2, 4, 1024

# --- rows and keys ----------------------------------------------------------------------------


@triton.jit
def _last_key(query_positions, query_valid, lse, m, exists, length):
    """The last key that query rows m attend to; -1: none, or the row does not count."""
    last = tl.where(exists, length - 1, -1)
    if query_positions is not None:
        position = tl.load(query_positions + m, mask=exists, other=-1)
        last = tl.minimum(tl.maximum(position, -1), length - 1).to(tl.int32)
    if query_valid is not None:
        counts = tl.load(query_valid + m, mask=exists, other=0) != 0
        last = tl.where(counts, last, -1)
    if lse is not None:
        last = tl.where(lse == float("-inf"), -1, last)
    return last


@triton.jit
def _attending_rows(query_positions, query_valid, rows, length, first, BLOCK: tl.constexpr):
    """begin and end of the query rows that attend to keys from `first` on, those between included;
    and the farthest key any row attends to."""
    if query_positions is None and query_valid is None:
        begin = 0
        end = rows
        farthest = length - 1
    else:
        begin = rows
        end = rows * 0
        farthest = end - 1
        for start in range(0, rows, BLOCK):
            m = start + tl.arange(0, BLOCK)
            last = _last_key(query_positions, query_valid, None, m, m < rows, length)
            begin = tl.minimum(begin, tl.min(tl.where(last >= first, m, rows)))
            end = tl.maximum(end, tl.max(tl.where(last >= first, m + 1, 0)))
            farthest = tl.maximum(farthest, tl.max(last))
    return begin, end, farthest


@triton.jit
def _are_attended(candidates, valid, keys, length):
    """Whether keys, all or the candidates alone, may be attended to."""
    exists = keys < length
    attended = exists
    if candidates is not None:
        attended &= tl.load(candidates + keys, mask=exists, other=0) != 0
    if valid is not None:
        attended &= tl.load(valid + keys, mask=exists, other=0) != 0
    return attended


@triton.jit
def _load(rows, wanted, first, dim, CHUNK: tl.constexpr):
    """[rows, CHUNK] elements from `first` on, 0 in rows that are not wanted and past the end."""
    d = first + tl.arange(0, CHUNK)
    mask = wanted[:, None] & (d < dim)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _multiply(
    held, keys, read, queries, exists, dim,
    KEYS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[KEYS, ROWS] products of the rows that two vectors of pointers point to. The keys may be held
    already, then a chunk is all of a row."""
    products = tl.zeros([KEYS, ROWS], tl.float32)
    if held is not None:
        rows = _load(queries, exists, 0, dim, CHUNK)
        products = tl.dot(held, tl.trans(rows), products, input_precision="ieee")
    else:
        for first in range(0, dim, CHUNK):
            rows = _load(queries, exists, first, dim, CHUNK)
            some = _load(keys, read, first, dim, CHUNK)
            products = tl.dot(some, tl.trans(rows), products, input_precision="ieee")
    return products


# --- softmax ----------------------------------------------------------------------------------


@triton.jit
def _finite(maximum):
    """What to subtract in an exponent: finite where there is no logit but -inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _share(total):
    """A sum of 0 is a row that attends to nothing, whose share nobody asks for, or one whose logits
    are all -inf, of which softmax makes NaN."""
    return 1.0 / tl.where(total == 0.0, float("nan"), total)


@triton.jit
def _merged(
    maxima, sums, row, last, tiles, stride,
    KEYS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of rows over all tiles of KEYS keys up to the last that each attends to."""
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)[:, None]
        written = (tile < tiles) & (tile * KEYS <= last[None, :])
        at = tile.to(tl.int64) * stride + row[None, :]
        tile_maximum = tl.load(maxima + at, mask=written, other=float("-inf"))
        tile_sum = tl.load(sums + at, mask=written, other=0.0)
        larger = tl.maximum(maximum, tl.max(tile_maximum, 0))
        base = _finite(larger)
        total *= tl.exp2(maximum - base)
        total += tl.sum(tile_sum * tl.exp2(tile_maximum - base[None, :]), 0)
        maximum = larger
    return maximum, total


# --- passes over K ----------------------------------------------------------------------------


@tuned(
    [
        triton.Config({}, num_warps=4, num_stages=2),
        triton.Config({}, num_warps=8, num_stages=2),
        triton.Config({}, num_warps=8, num_stages=3),
    ],
    key=["ROWS", "CHUNK", "HOLD"],
)
@triton.jit(
    do_not_specialize=[
        *("candidates_stride", "valid_stride", "positions_stride", "query_valid_stride"),
        *("rows", "length", "tiles"),
    ]
)
def _statistics(
    query, query_batch, query_head, query_row, key, key_batch, key_head, key_row,
    candidates, candidates_stride, valid, valid_stride,
    query_positions, positions_stride, query_valid, query_valid_stride,
    logits, logits_stride, maxima, sums, kv_heads, group, rows, length, dim, tiles, factor,
    KEYS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Row statistics of a tile of keys, and if wanted the logits. Rows that attend to no key of the
    tile, by their position, may be left out."""
    unit = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = unit % kv_heads
    batch = (unit // kv_heads).to(tl.int64)
    query += batch * query_batch + kv_head.to(tl.int64) * group * query_head
    key += batch * key_batch + kv_head.to(tl.int64) * key_head
    if candidates is not None:
        candidates += batch * candidates_stride
    if valid is not None:
        valid += batch * valid_stride
    if query_positions is not None:
        query_positions += batch * positions_stride
    if query_valid is not None:
        query_valid += batch * query_valid_stride
    shared = rows * group
    maxima += ((batch * tiles + tile) * kv_heads + kv_head) * shared
    sums += ((batch * tiles + tile) * kv_heads + kv_head) * shared
    if logits is not None:
        logits += (batch * kv_heads + kv_head) * shared * logits_stride

    keys = tile * KEYS + tl.arange(0, KEYS)
    attended = _are_attended(candidates, valid, keys, length)
    begin, end, farthest = _attending_rows(
        query_positions, query_valid, rows, length, tile * KEYS, 128
    )
    read = attended & (keys <= farthest)
    keys_at = key + keys.to(tl.int64) * key_row
    held = None
    if HOLD:
        held = _load(keys_at, read, 0, dim, CHUNK)
    for start in range(begin * group, end * group, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < end * group
        m = row // group
        last = _last_key(query_positions, query_valid, None, m, exists, length)
        rows_at = query + (row % group).to(tl.int64) * query_head + m.to(tl.int64) * query_row
        logit = factor * _multiply(held, keys_at, read, rows_at, exists, dim, KEYS, ROWS, CHUNK)
        if logits is not None:
            at = row.to(tl.int64)[None, :] * logits_stride + keys[:, None]
            tl.store(logits + at, logit, mask=exists[None, :] & (keys < length)[:, None])
        counts = attended[:, None] & (keys[:, None] <= last[None, :])
        logit = tl.where(counts, logit, float("-inf"))
        maximum = tl.max(logit, 0)
        total = tl.sum(tl.exp2(logit - _finite(maximum)[None, :]), 0)
        tl.store(maxima + row, maximum, mask=exists)
        tl.store(sums + row, total, mask=exists)


@triton.jit(do_not_specialize=["positions_stride", "query_valid_stride", "rows", "length", "tiles"])
def _merge(
    maxima, sums, query_positions, positions_stride, query_valid, query_valid_stride,
    merged_maxima, merged_sums, heads, group, rows, length, tiles,
    KEYS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row statistics of all keys."""
    blocks = tl.cdiv(heads * rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    exists = row < heads * rows
    if query_positions is not None:
        query_positions += batch * positions_stride
    if query_valid is not None:
        query_valid += batch * query_valid_stride
    last = _last_key(query_positions, query_valid, None, row // group % rows, exists, length)
    maxima += batch * tiles * heads * rows
    sums += batch * tiles * heads * rows
    maximum, total = _merged(maxima, sums, row, last, tiles, heads * rows, KEYS, TILES, ROWS)
    tl.store(merged_maxima + batch * heads * rows + row, maximum, mask=exists)
    tl.store(merged_sums + batch * heads * rows + row, total, mask=exists)


@tuned(
    [
        triton.Config({}, num_warps=4, num_stages=2),
        triton.Config({}, num_warps=8, num_stages=2),
        triton.Config({}, num_warps=8, num_stages=3),
    ],
    key=["ROWS", "CHUNK", "HOLD", "BY_HEAD"],
)
@triton.jit(
    do_not_specialize=[
        *("candidates_stride", "valid_stride", "positions_stride", "query_valid_stride"),
        *("lse_batch", "lse_head", "rows", "length", "tiles", "segments"),
    ]
)
def _columns(
    query, query_batch, query_head, query_row, key, key_batch, key_head, key_row,
    candidates, candidates_stride, valid, valid_stride,
    query_positions, positions_stride, query_valid, query_valid_stride, lse, lse_batch, lse_head,
    maxima, sums, columns, kv_heads, group, rows, length, dim, tiles, segments, factor,
    KEYS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, HOLD: tl.constexpr,
    BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of keys, added up over all rows, or over those of the head that gives
    most: then there is a segment for every head of the group, else one."""
    unit = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = unit % kv_heads
    batch = (unit // kv_heads).to(tl.int64)
    query += batch * query_batch + kv_head.to(tl.int64) * group * query_head
    key += batch * key_batch + kv_head.to(tl.int64) * key_head
    candidates += batch * candidates_stride
    if valid is not None:
        valid += batch * valid_stride
    if query_positions is not None:
        query_positions += batch * positions_stride
    if query_valid is not None:
        query_valid += batch * query_valid_stride
    if lse is not None:
        lse += batch * lse_batch + kv_head.to(tl.int64) * group * lse_head
    else:
        maxima += (batch * kv_heads + kv_head) * rows * group
        sums += (batch * kv_heads + kv_head) * rows * group

    keys = tile * KEYS + tl.arange(0, KEYS)
    attended = _are_attended(candidates, valid, keys, length)
    begin, end, farthest = _attending_rows(
        query_positions, query_valid, rows, length, tile * KEYS, 128
    )
    read = attended & (keys <= farthest)
    end = tl.where(tl.max(read.to(tl.int32)) != 0, end, begin)
    keys_at = key + keys.to(tl.int64) * key_row
    held = None
    if HOLD:
        held = _load(keys_at, read, 0, dim, CHUNK)
    heads = 1 if BY_HEAD else group  # of a segment
    column = tl.zeros([KEYS], tl.float32)
    for segment in range(segments):
        weights = tl.zeros([KEYS, ROWS], tl.float32)
        for start in range(begin * heads, end * heads, ROWS):
            row = start + tl.arange(0, ROWS)
            exists = row < end * heads
            m = row // heads
            head = segment + row % heads
            if lse is not None:
                row_lse = tl.load(
                    lse + head.to(tl.int64) * lse_head + m, mask=exists, other=float("-inf")
                )
                base = LOG2_E * row_lse
                share = tl.full([ROWS], 1.0, tl.float32)
                last = _last_key(query_positions, query_valid, row_lse, m, exists, length)
            else:
                at = m * group + head
                base = _finite(tl.load(maxima + at, mask=exists, other=0.0))
                share = _share(tl.load(sums + at, mask=exists, other=1.0))
                last = _last_key(query_positions, query_valid, None, m, exists, length)
            rows_at = query + head.to(tl.int64) * query_head + m.to(tl.int64) * query_row
            products = _multiply(held, keys_at, read, rows_at, exists, dim, KEYS, ROWS, CHUNK)
            weight = tl.exp2(products * factor - base[None, :]) * share[None, :]
            counts = attended[:, None] & (keys[:, None] <= last[None, :])
            weights += tl.where(counts, weight, 0.0)
        column = tl.maximum(
            column, tl.sum(weights, 1), propagate_nan=tl.PropagateNan.ALL
        )  # NaN wins, as in torch
    columns += (batch * kv_heads + kv_head) * length
    tl.store(columns + keys, column, mask=keys < length)


# --- scores -----------------------------------------------------------------------------------


@triton.jit
def _add_heads(total, heads, IS_MAX: tl.constexpr):
    """[keys] of the heads so far and of [heads, keys] more, none below 0. NaN wins, as in torch."""
    if IS_MAX:
        is_nan = tl.max((heads != heads).to(tl.int32), 0) != 0
        largest = tl.where(is_nan, float("nan"), tl.max(heads, 0))
        total = tl.maximum(total, largest, propagate_nan=tl.PropagateNan.ALL)
    else:
        total += tl.sum(heads, 0)
    return total


@triton.jit
def _count_rows(query_valid, rows, BLOCK: tl.constexpr):
    """Rows that count, at least 1, as a float."""
    if query_valid is None:
        count = rows
    else:
        count = rows * 0
        for start in range(0, rows, BLOCK):
            m = start + tl.arange(0, BLOCK)
            counts = tl.load(query_valid + m, mask=m < rows, other=0) != 0
            count += tl.sum(counts.to(tl.int32))
        count = tl.maximum(count, 1)
    return count.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        *("candidates_stride", "valid_stride", "positions_stride", "query_valid_stride"),
        *("rows", "length", "tiles"),
    ]
)
def _finish_rows(
    logits, logits_stride, maxima, sums, candidates, candidates_stride, valid, valid_stride,
    query_positions, positions_stride, query_valid, query_valid_stride, scores,
    heads, group, rows, length, tiles, factor, IS_MAX: tl.constexpr, TILE_KEYS: tl.constexpr,
    TILES: tl.constexpr, HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores of a block of keys by the logits and statistics of all rows, HEAD_ROWS a head."""
    blocks = tl.cdiv(length, KEYS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    logits += batch * heads * rows * logits_stride
    maxima += batch * tiles * heads * rows
    sums += batch * tiles * heads * rows
    if valid is not None:
        valid += batch * valid_stride
    if query_positions is not None:
        query_positions += batch * positions_stride
    if query_valid is not None:
        query_valid += batch * query_valid_stride
    scored = _are_attended(candidates + batch * candidates_stride, valid, keys, length)
    total = tl.zeros([KEYS], tl.float32)
    for first_head in range(0, heads, HEADS):
        head = first_head + tl.arange(0, HEADS * HEAD_ROWS) // HEAD_ROWS
        m = tl.arange(0, HEADS * HEAD_ROWS) % HEAD_ROWS
        exists = (head < heads) & (m < rows)
        last = _last_key(query_positions, query_valid, None, m, exists, length)
        row = (head // group * rows + m) * group + head % group
        maximum, row_sum = _merged(
            maxima, sums, row, last, tiles, heads * rows, TILE_KEYS, TILES, HEADS * HEAD_ROWS
        )
        counts = scored[None, :] & (keys[None, :] <= last[:, None])
        at = row.to(tl.int64)[:, None] * logits_stride + keys[None, :]
        logit = tl.load(logits + at, mask=counts, other=float("-inf"))
        weight = tl.exp2(logit - _finite(maximum)[:, None]) * _share(row_sum)[:, None]
        weight = tl.where(counts, weight, 0.0)
        if IS_MAX and HEAD_ROWS > 1:
            weight = tl.sum(tl.reshape(weight, [HEADS, HEAD_ROWS, KEYS]), 1)
        total = _add_heads(total, weight, IS_MAX)
    total *= factor / _count_rows(query_valid, rows, 128)
    tl.store(scores + batch * length + keys, tl.where(scored, total, 0.0), mask=keys < length)


@triton.jit(
    do_not_specialize=[
        *("candidates_stride", "valid_stride", "query_valid_stride", "rows", "length"),
    ]
)
def _finish_columns(
    columns, candidates, candidates_stride, valid, valid_stride, query_valid, query_valid_stride,
    scores, kv_heads, rows, length, factor,
    IS_MAX: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores of a block of keys by the columns of all KV heads."""
    blocks = tl.cdiv(length, KEYS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    keys = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    columns += batch * kv_heads * length
    if valid is not None:
        valid += batch * valid_stride
    if query_valid is not None:
        query_valid += batch * query_valid_stride
    scored = _are_attended(candidates + batch * candidates_stride, valid, keys, length)
    total = tl.zeros([KEYS], tl.float32)
    for first_head in range(0, kv_heads, HEADS):
        head = first_head + tl.arange(0, HEADS)[:, None]
        at = head.to(tl.int64) * length + keys[None, :]
        column = tl.load(columns + at, mask=(head < kv_heads) & scored[None, :], other=0.0)
        total = _add_heads(total, column, IS_MAX)
    total *= factor / _count_rows(query_valid, rows, 128)
    tl.store(scores + batch * length + keys, tl.where(scored, total, 0.0), mask=keys < length)


# --- host -------------------------------------------------------------------------------------


def _and_stride(x: Tensor | None) -> tuple[Tensor | None, int]:
    return x, 0 if x is None else x.stride(0)


class _Call:
    """The arguments as kernels take them, and what several launches need."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        candidates: Tensor,
        valid: Tensor | None,
        query_positions: Tensor | None,
        query_valid: Tensor | None,
        scale: float,
        head_reduce: str,
    ):
        self.batch, self.heads, self.rows, dim = query.shape
        self.kv_heads, self.length = key.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.new_empty = functools.partial(query.new_empty, dtype=torch.float32)
        self.query_and_key = (query, *query.stride()[:3], key, *key.stride()[:3])
        self.candidates = _and_stride(candidates)
        self.valid = _and_stride(valid)
        self.query_positions = _and_stride(query_positions)
        self.query_valid = _and_stride(query_valid)
        self.factor = scale * LOG2_E.value
        self.is_max = head_reduce == "max"
        self.head_factor = 1.0 / self.heads if head_reduce == "mean" else 1.0

        # Operands of tensor cores are in shared memory, those of float32 products in registers.
        padded = max(16, triton.next_power_of_2(dim))
        is_float32 = query.dtype == torch.float32
        chunk = min(padded, FLOAT32_CHUNK) if is_float32 else padded
        self.keys = FLOAT32_KEYS if is_float32 else KEY_BYTES // (2 * max(padded, 128))
        self.tiles = triton.cdiv(self.length, self.keys)
        self.shape = (self.kv_heads, self.group, self.rows, self.length, dim, self.tiles)
        self.blocks = {
            "KEYS": self.keys,
            "ROWS": FEW_ROWS if self.has_few_rows() else MANY_ROWS,
            "CHUNK": chunk,
            "HOLD": chunk == padded,
        }

    def has_few_rows(self) -> bool:
        return self.group * self.rows <= FEW_ROWS

    def statistics(self, logits: Tensor | None, of_candidates: bool) -> tuple[Tensor, Tensor]:
        """Maxima and sums [B, tiles, rows], and the logits if there is room for them."""
        maxima = self.new_empty((self.batch, self.tiles, self.heads * self.rows))
        sums = torch.empty_like(maxima)
        _statistics[(self.batch * self.kv_heads * self.tiles,)](
            *self.query_and_key,
            *(self.candidates if of_candidates else (None, 0)),
            *self.valid,
            *self.query_positions,
            *self.query_valid,
            logits,
            self.tiles * self.keys,
            maxima,
            sums,
            *self.shape,
            self.factor,
            **self.blocks,
        )
        return maxima, sums

    def merged(self, maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The same [B, 1, rows] of all tiles."""
        of_all = self.new_empty((self.batch, 1, self.heads * self.rows))
        sums_of_all = torch.empty_like(of_all)
        _merge[(self.batch * triton.cdiv(self.heads * self.rows, MERGE_ROWS),)](
            maxima,
            sums,
            *self.query_positions,
            *self.query_valid,
            of_all,
            sums_of_all,
            self.heads,
            self.group,
            self.rows,
            self.length,
            self.tiles,
            KEYS=self.keys,
            TILES=MERGED_AT_ONCE,
            ROWS=MERGE_ROWS,
        )
        return of_all, sums_of_all

    def finish_rows(self, logits: Tensor, maxima: Tensor, sums: Tensor, scores: Tensor) -> None:
        tiles = maxima.shape[1]
        head_rows = triton.next_power_of_2(self.rows)
        heads = min(FINISH_ROWS // head_rows, triton.next_power_of_2(self.heads))
        _finish_rows[(self.batch * triton.cdiv(self.length, FINISH_KEYS),)](
            logits,
            self.tiles * self.keys,
            maxima,
            sums,
            *self.candidates,
            *self.valid,
            *self.query_positions,
            *self.query_valid,
            scores,
            self.heads,
            self.group,
            self.rows,
            self.length,
            tiles,
            self.head_factor,
            IS_MAX=self.is_max,
            TILE_KEYS=self.keys,
            TILES=MERGED_AT_ONCE if tiles > 1 else 1,
            HEADS=heads,
            HEAD_ROWS=head_rows,
            KEYS=FINISH_KEYS,
        )

    def columns(self, lse: Tensor | None, maxima: Tensor | None, sums: Tensor | None) -> Tensor:
        """[B, Hkv, S]: the weights of all rows added up, or of the head that gives most."""
        columns = self.new_empty((self.batch, self.kv_heads, self.length))
        _columns[(self.batch * self.kv_heads * self.tiles,)](
            *self.query_and_key,
            *self.candidates,
            *self.valid,
            *self.query_positions,
            *self.query_valid,
            lse,
            *((0, 0) if lse is None else lse.stride()[:2]),
            maxima,
            sums,
            columns,
            *self.shape,
            self.group if self.is_max else 1,
            self.factor,
            **self.blocks,
            BY_HEAD=self.is_max,
        )
        return columns

    def finish_columns(self, columns: Tensor, scores: Tensor) -> None:
        _finish_columns[(self.batch * triton.cdiv(self.length, FINISH_KEYS),)](
            columns,
            *self.candidates,
            *self.valid,
            *self.query_valid,
            scores,
            self.kv_heads,
            self.rows,
            self.length,
            self.head_factor,
            IS_MAX=self.is_max,
            HEADS=min(32, triton.next_power_of_2(self.kv_heads)),
            KEYS=FINISH_KEYS,
        )


def attention_scores(
    query: Tensor,
    key: Tensor,
    candidates: Tensor,
    valid: Tensor | None,
    query_positions: Tensor | None,
    query_valid: Tensor | None,
    lse: Tensor | None,
    scale: float,
    support: str,
    head_reduce: str,
) -> Tensor:
    scores = candidates.new_empty(candidates.shape, dtype=torch.float32)
    if scores.numel() == 0 or query.shape[2] == 0:
        return scores.zero_()
    masks = (candidates, valid, query_positions, query_valid)
    call = _Call(query, key, *masks, scale, head_reduce)
    if lse is not None:
        call.finish_columns(call.columns(lse, None, None), scores)
        return scores
    logits = None
    if call.has_few_rows():
        logits = call.new_empty((call.batch, call.heads * call.rows, call.tiles * call.keys))
    statistics = call.statistics(logits, of_candidates=support == "candidates")
    if logits is None or call.tiles > FEW_TILES:
        statistics = call.merged(*statistics)
    if logits is not None:
        call.finish_rows(logits, *statistics, scores)
    else:
        call.finish_columns(call.columns(None, *statistics), scores)
    return scores
