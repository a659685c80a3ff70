"""passive_attention, without the work on what has no weight.

One kernel lists the tokens by kind. A program of the other takes a tile of query rows of one kind,
text or visual, through two lists of keys: first the `silent` ones, which only stand in the softmax
denominator (no value is read, no second product taken), then the `weighted` ones, which reach the
output.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import INTERPRETED, size_class, tuned

# Lists of positions, each ascending. All but the last are of valid tokens.
TEXT = tl.constexpr(0)
VISUAL = tl.constexpr(1)
ALL = tl.constexpr(2)
TEXT_AND_FIRST = tl.constexpr(3)  # text and the first visual token
BLANK = tl.constexpr(4)  # rows that output 0: padding, and visual rows that are skipped
# How many text and visual tokens there are up to each position, itself included.
TEXT_UNTIL = tl.constexpr(5)
VISUAL_UNTIL = tl.constexpr(6)
LISTS = tl.constexpr(7)
NONE = tl.constexpr(-1)


@triton.jit(do_not_specialize=["visual_stride", "valid_stride", "length"])
def _list_tokens(
    visual, visual_stride, valid, valid_stride, length, lists,
    SKIP_VISUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    lists += batch * LISTS * length
    texts = 0  # in the blocks before
    visuals = 0
    for start in range(0, length, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < length
        is_visual = tl.load(visual + batch * visual_stride + position, mask=inside, other=0) != 0
        is_valid = inside
        if valid is not None:
            is_valid &= tl.load(valid + batch * valid_stride + position, mask=inside, other=0) != 0
        is_text = is_valid & ~is_visual
        is_visual &= is_valid
        text_until = texts + tl.cumsum(is_text.to(tl.int32))
        visual_until = visuals + tl.cumsum(is_visual.to(tl.int32))
        tl.store(lists + TEXT_UNTIL * length + position, text_until, mask=inside)
        tl.store(lists + VISUAL_UNTIL * length + position, visual_until, mask=inside)

        tl.store(lists + TEXT * length + text_until - 1, position, mask=is_text)
        tl.store(lists + VISUAL * length + visual_until - 1, position, mask=is_visual)
        place = text_until + visual_until - 1
        tl.store(lists + ALL * length + place, position, mask=is_valid)
        place = text_until + tl.minimum(visual_until, 1) - 1
        listed = is_text | (is_visual & (visual_until == 1))
        tl.store(lists + TEXT_AND_FIRST * length + place, position, mask=listed)
        listed = is_text if SKIP_VISUAL else is_valid
        place = position - (text_until if SKIP_VISUAL else text_until + visual_until)
        tl.store(lists + BLANK * length + place, position, mask=inside & ~listed)
        texts += tl.sum(is_text.to(tl.int32))
        visuals += tl.sum(is_visual.to(tl.int32))


@triton.jit
def _of_head(base, batch, batch_stride, head, head_stride, ALIGNMENT: tl.constexpr):
    return base + tl.multiple_of(batch * batch_stride + head * head_stride, ALIGNMENT)


@triton.jit
def _until(LIST: tl.constexpr, text_until, visual_until):
    """How many entries of a list rows attend to, the first ones: lists ascend."""
    if LIST == TEXT:
        return text_until
    elif LIST == VISUAL:
        return visual_until
    elif LIST == ALL:
        return text_until + visual_until
    elif LIST == TEXT_AND_FIRST:
        return text_until + tl.minimum(visual_until, 1)
    else:
        return text_until * 0


@triton.jit
def _read_rows(
    base, position, stride, real,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Rows [positions, COLUMNS]; zeros in those that are not real, and past DIM. Every row is
    aligned to ALIGNMENT elements."""
    start = tl.multiple_of(position.to(tl.int64) * stride, ALIGNMENT)
    column = tl.arange(0, COLUMNS)
    pointers = base + start[:, None] + column[None, :]
    if DIM == COLUMNS:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers, mask=real[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _weigh(query, key, factor, attended, maximum):
    """Weights relative to the new maximum, and what sums relative to the old one are worth."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    logits = tl.where(attended, logits, float("-inf"))
    top = tl.maximum(maximum, tl.max(logits, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
    return tl.exp2(logits - base[:, None]), tl.exp2(maximum - base), top


@triton.jit
def _add_values(sums, weights, value):
    """sums + weights value. One 16-bit float would round the weights to 2^-9 or 2^-12, which sums
    would show even after they are rounded themselves; two add up to float32 near enough."""
    if value.dtype == tl.float32:
        return tl.dot(weights, value, sums, input_precision="ieee")
    high = weights.to(value.dtype)
    low = (weights - high.to(tl.float32)).to(value.dtype)
    return tl.dot(low, value, tl.dot(high, value, sums))


@triton.jit
def _attend_tile(
    query, query_stride, key, key_stride, value, value_stride, out, lists, length, factor,
    is_text, first, count,
    TEXT_WEIGHTED: tl.constexpr, TEXT_SILENT: tl.constexpr, VISUAL_WEIGHTED: tl.constexpr,
    VISUAL_SILENT: tl.constexpr, MERGE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Rows from entry `first` on of the list of text or of visual tokens, which has `count`; the
    pointers are to those of a head."""
    row = first + tl.arange(0, ROWS)
    real = row < count
    row_list = lists + tl.where(is_text, TEXT, VISUAL) * length
    position = tl.load(row_list + row, mask=real, other=0)
    text_until = tl.load(lists + TEXT_UNTIL * length + position, mask=real, other=0)
    visual_until = tl.load(lists + VISUAL_UNTIL * length + position, mask=real, other=0)
    weighted = tl.where(
        is_text,
        _until(TEXT_WEIGHTED, text_until, visual_until),
        _until(VISUAL_WEIGHTED, text_until, visual_until),
    )
    silent = tl.where(
        is_text,
        _until(TEXT_SILENT, text_until, visual_until),
        _until(VISUAL_SILENT, text_until, visual_until),
    )
    rows = _read_rows(query, position, query_stride, real, DIM, COLUMNS, ALIGNMENT)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)

    silent_sum = tl.zeros([ROWS], tl.float32)
    key_list = lists + tl.where(is_text, TEXT_SILENT, VISUAL_SILENT) * length
    end = tl.max(silent)
    for start in range(0, end, KEYS):
        rank = start + tl.arange(0, KEYS)
        position_of_key = tl.load(key_list + rank, mask=rank < end, other=0)
        keys = _read_rows(key, position_of_key, key_stride, rank < end, DIM, COLUMNS, ALIGNMENT)
        attended = rank[None, :] < silent[:, None]
        weights, keep, maximum = _weigh(rows, keys, factor, attended, maximum)
        silent_sum = silent_sum * keep + tl.sum(weights, 1)

    weighted_sum = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    key_list = lists + tl.where(is_text, TEXT_WEIGHTED, VISUAL_WEIGHTED) * length
    end = tl.max(weighted)
    for start in range(0, end, KEYS):
        rank = start + tl.arange(0, KEYS)
        position_of_key = tl.load(key_list + rank, mask=rank < end, other=0)
        keys = _read_rows(key, position_of_key, key_stride, rank < end, DIM, COLUMNS, ALIGNMENT)
        values = _read_rows(
            value, position_of_key, value_stride, rank < end, DIM, COLUMNS, ALIGNMENT
        )
        attended = rank[None, :] < weighted[:, None]
        weights, keep, maximum = _weigh(rows, keys, factor, attended, maximum)
        silent_sum = silent_sum * keep
        weighted_sum = weighted_sum * keep + tl.sum(weights, 1)
        sums = _add_values(sums * keep[:, None], weights, values)

    # Who attends to logits of -inf alone gets NaN, as softmax has it; who attends to nothing, 0.
    total = weighted_sum + silent_sum
    of_nothing = tl.where(weighted + silent > 0, float("nan"), 0.0)
    share = tl.where(total == 0.0, of_nothing, 1.0 / tl.where(total == 0.0, 1.0, total))
    result = sums * share[:, None]
    column = tl.arange(0, COLUMNS)
    if MERGE:
        if is_text & (tl.max(silent) > 0):
            first_visual = tl.load(lists + VISUAL * length).to(tl.int64)
            first_value = tl.load(
                value + first_visual * value_stride + column, mask=column < DIM, other=0.0
            )
            moved = tl.where(silent > 0, silent_sum * share, 0.0)
            merged = moved[:, None] * first_value.to(tl.float32)[None, :]
            result += tl.where(moved[:, None] == 0.0, 0.0, merged)
    tl.store(
        out + (position.to(tl.int64) * DIM)[:, None] + column[None, :],
        result.to(out.dtype.element_ty),
        mask=real[:, None] & (column < DIM)[None, :],
    )


@tuned(
    [
        triton.Config({"ROWS": 128, "KEYS": 64}, num_warps=8, num_stages=2),
        triton.Config({"ROWS": 128, "KEYS": 32}, num_warps=8, num_stages=3),
        triton.Config({"ROWS": 64, "KEYS": 64}, num_warps=4, num_stages=2),
        triton.Config({"ROWS": 64, "KEYS": 32}, num_warps=4, num_stages=3),
    ],
    key=["DIM", "length_class"],
)
@triton.jit(
    do_not_specialize=[
        *("query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row"),
        *("value_batch", "value_head", "value_row", "heads", "group", "length", "length_class"),
    ]
)
def _attend(
    query, query_batch, query_head, query_row, key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row, out, lists,
    heads, group, length, length_class, factor,
    TEXT_WEIGHTED: tl.constexpr, TEXT_SILENT: tl.constexpr, VISUAL_WEIGHTED: tl.constexpr,
    VISUAL_SILENT: tl.constexpr, SKIP_VISUAL: tl.constexpr, MERGE: tl.constexpr, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr, SHRINK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = max(ROWS // SHRINK, 16)
    KEY_TILE: tl.constexpr = max(KEYS // SHRINK, 16)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    lists += batch * LISTS * length
    out += (batch * heads + head) * length * DIM

    # Text rows and visual rows that lie late have most keys and go first.
    texts = tl.load(lists + TEXT_UNTIL * length + length - 1)
    visuals = tl.load(lists + VISUAL_UNTIL * length + length - 1)
    if SKIP_VISUAL:
        visuals = 0
    text_tiles = tl.cdiv(texts, TILE)
    tiles = text_tiles + tl.cdiv(visuals, TILE)
    tile = tl.program_id(1)
    if tile < tiles:
        is_text = tile < text_tiles
        _attend_tile(
            _of_head(query, batch, query_batch, head, query_head, ALIGNMENT), query_row,
            _of_head(key, batch, key_batch, head // group, key_head, ALIGNMENT), key_row,
            _of_head(value, batch, value_batch, head // group, value_head, ALIGNMENT), value_row,
            out, lists, length, factor,
            is_text, (tl.where(is_text, text_tiles, tiles) - 1 - tile) * TILE,
            tl.where(is_text, texts, visuals),
            TEXT_WEIGHTED, TEXT_SILENT, VISUAL_WEIGHTED, VISUAL_SILENT, MERGE,
            DIM, COLUMNS, ALIGNMENT, TILE, KEY_TILE,
        )  # fmt: skip
    else:
        row = (tile - tiles) * TILE + tl.arange(0, TILE)
        blank = row < length - texts - visuals
        position = tl.load(lists + BLANK * length + row, mask=blank, other=0).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        tl.store(
            out + (position * DIM)[:, None] + column[None, :],
            tl.zeros([TILE, COLUMNS], out.dtype.element_ty),
            mask=blank[:, None] & (column < DIM)[None, :],
        )


def passive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: Tensor,
    valid: Tensor | None,
    sink: str,
    visual_rows: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    batch, heads, length, dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    merge = sink == "merge"
    lists = _lists(visual, valid, visual_rows == "skip")
    columns = max(triton.next_power_of_2(dim), 16)
    shrink = _shrink(columns, query.element_size())
    _attend[lambda meta: (batch * heads, length // max(meta["ROWS"] // shrink, 16) + 3)](
        *(query, *query.stride()[:3], key, *key.stride()[:3], value, *value.stride()[:3]),
        *(out, lists, heads, heads // key.shape[1], length, size_class(length)),
        scale * math.log2(math.e),
        **_keys_of_text(merge, renormalize),
        **_keys_of_visual(visual_rows, renormalize),
        SKIP_VISUAL=visual_rows == "skip",
        DIM=dim,
        COLUMNS=columns,
        ALIGNMENT=_alignment(query, key, value),
        SHRINK=shrink,
    )
    return out


def _shrink(columns: int, element_size: int) -> int:
    """How many times smaller than ROWS and KEYS tiles are, for a thread has 255 registers at most.
    Products of float32 run on no tensor cores and take more."""
    if INTERPRETED:
        return 1
    return min(max(columns // (32 if element_size == 4 else 128), 1), 4)


def _lists(visual: Tensor, valid: Tensor | None, skip_visual: bool) -> Tensor:
    batch, length = visual.shape
    lists = visual.new_empty(batch, LISTS.value, length, dtype=torch.int32)
    _list_tokens[batch,](
        visual,
        visual.stride(0),
        valid,
        0 if valid is None else valid.stride(0),
        length,
        lists,
        SKIP_VISUAL=skip_visual,
        BLOCK=2048,
        num_warps=8,
    )
    return lists


def _keys_of_text(merge: bool, renormalize: bool) -> dict[str, int | bool]:
    """Which keys text rows attend to; with MERGE the silent mass goes to the first visual one."""
    if renormalize:
        weighted, silent = TEXT_AND_FIRST if merge else TEXT, NONE
    else:
        weighted, silent = TEXT, VISUAL
    merge = merge and not renormalize
    return {"TEXT_WEIGHTED": weighted.value, "TEXT_SILENT": silent.value, "MERGE": merge}


def _keys_of_visual(visual_rows: str, renormalize: bool) -> dict[str, int]:
    if visual_rows == "causal":
        weighted, silent = ALL, NONE
    else:
        weighted, silent = TEXT, NONE if renormalize else VISUAL
    return {"VISUAL_WEIGHTED": weighted.value, "VISUAL_SILENT": silent.value}


def _alignment(*tensors: Tensor) -> int:
    """How many elements all rows are aligned to: those of 16 bytes, or 1."""
    elements = 16 // tensors[0].element_size()
    aligned = all(
        x.data_ptr() % 16 == 0
        # With fewer than two entries in a dimension its stride says nothing.
        and all(n < 2 or s % elements == 0 for n, s in zip(x.shape[:3], x.stride(), strict=False))
        for x in tensors
    )
    return elements if aligned else 1
