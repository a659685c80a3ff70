"""Rows moved from place to place, many tensors a launch: what compact_rows and compact_kv share.

A chain is the row of slots of one (tensor, batch row, head), a tile the part of a chain that a
program holds at a time. Rows move in pieces of up to 16 bytes, whatever their dtype. The tensors of
a launch come as a table in its arguments: in device memory it would first have to be copied there.
Nothing is tuned: all that these kernels do is wait for memory.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tuning import INTERPRETED

MOST_TENSORS = 80  # of a launch: the keys and values of 40 layers
WARPS = 4
# The interpreter's time goes by programs and not by what they do: it gets fewer, larger ones.
SCALE = 16 if INTERPRETED else 1
LANES = 32 * SCALE  # that share a row

# Triton specialises the integers of a tuple on their width, on being 1 and on dividing by 16, and
# do_not_specialize does not reach them. Odd ones of 64 bits are all the same to it.
_WIDE = 1 << 62
_PAYLOAD = tl.constexpr(_WIDE - 1)


class Table(NamedTuple):
    """What a kernel has to know of its tensors, a column each, of one entry if all tensors agree.
    Addresses, sizes and strides are in pieces."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    row_size: tuple[int, ...]
    batch_stride: tuple[int, ...]  # of the source
    head_stride: tuple[int, ...]
    row_stride: tuple[int, ...]
    layer: tuple[int, ...]  # whose indices and counts it takes
    shape: tuple[int, ...]  # which of the tile shapes of the launch


class TileShape(NamedTuple):
    piece: int  # bytes
    rows: int
    columns: int  # in pieces


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _entry(column, tensor):
    entry = column[0]
    for i in tl.static_range(1, len(column)):
        entry = tl.where(tensor == i, column[i], entry)
    return (entry & _PAYLOAD) >> 1


@triton.jit
def _source(table, tensor, batch, head):
    """Where a chain's rows begin, in pieces."""
    return (
        _entry(table.source, tensor)
        + batch * _entry(table.batch_stride, tensor)
        + head * _entry(table.head_stride, tensor)
    )


@triton.jit
def _pointer(pieces, PIECE: tl.constexpr):
    """The pointer to integers that an address in pieces is. A piece is one integer, or two."""
    if PIECE >= 8:
        pointer = (pieces * PIECE).to(tl.pointer_type(tl.int64))
    elif PIECE == 4:
        pointer = (pieces * PIECE).to(tl.pointer_type(tl.int32))
    elif PIECE == 2:
        pointer = (pieces * PIECE).to(tl.pointer_type(tl.int16))
    else:
        pointer = (pieces * PIECE).to(tl.pointer_type(tl.int8))
    return tl.multiple_of(pointer, PIECE)


@triton.jit
def _in_row(column, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    """The integers of a row that a tile covers from piece `column` on."""
    INTEGERS: tl.constexpr = 2 if PIECE == 16 else 1
    return column * INTEGERS + tl.arange(0, COLUMNS * INTEGERS)


@triton.jit
def _offsets(rows, column, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile's integers, where `rows` are the pieces in front of its rows."""
    INTEGERS: tl.constexpr = 2 if PIECE == 16 else 1
    return (rows * INTEGERS)[:, None] + _in_row(column, PIECE, COLUMNS)[None, :]


@triton.jit
def _inside(column, row_size, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    INTEGERS: tl.constexpr = 2 if PIECE == 16 else 1
    return (_in_row(column, PIECE, COLUMNS) < row_size * INTEGERS)[None, :]


@triton.jit
def _count_of_chain(counts, at, slots):
    if counts is None:
        return slots
    else:
        return tl.minimum(tl.maximum(tl.load(counts + at), 0), slots).to(tl.int32)


@triton.jit
def _copy_tile(
    table, tensor, batches, heads, slots, indices, index_layer, index_batch, index_head,
    counts, count_layer, count_batch, count_head, ALIGN_RIGHT: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile's rows from where they were to where they go; zeros in the slots that none goes to."""
    row_size = _entry(table.row_size, tensor)
    side_by_side = tl.cdiv(row_size, COLUMNS).to(tl.int32)
    column = tl.program_id(0) % side_by_side * COLUMNS
    above = tl.program_id(0) // side_by_side
    tiles = tl.cdiv(slots, ROWS)
    slot = above % tiles * ROWS + tl.arange(0, ROWS)
    chain = (above // tiles).to(tl.int64)
    batch = chain // heads
    head = chain % heads
    if batch < batches:  # not all tensors have as many tiles
        layer = _entry(table.layer, tensor)
        at = layer * count_layer + batch * count_batch + head * count_head
        count = _count_of_chain(counts, at, slots)
        rank = slot
        if ALIGN_RIGHT:
            rank = slot - (slots - count)
        real = (rank >= 0) & (rank < count)
        indices += layer * index_layer + batch * index_batch + head * index_head
        row = tl.load(indices + rank, mask=real, other=0)
        source = _source(table, tensor, batch, head)
        inside = _inside(column, row_size, PIECE, COLUMNS)
        offsets = _offsets(row * _entry(table.row_stride, tensor), column, PIECE, COLUMNS)
        tile = tl.load(_pointer(source, PIECE) + offsets, mask=real[:, None] & inside, other=0)
        target = _pointer(_entry(table.target, tensor) + chain * slots * row_size, PIECE)
        offsets = _offsets(slot * row_size, column, PIECE, COLUMNS)
        tl.store(target + offsets, tile, mask=(slot < slots)[:, None] & inside)


@triton.jit
def _read_tile(
    chain, row_stride, column, inside, indices, slot, count,
    PIECE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows that go to slots of a chain, and which slots do not keep what they have."""
    row = tl.load(indices + slot, mask=slot < count, other=0)
    moves = ((slot < count) & (row != slot))[:, None] & inside
    offsets = _offsets(row * row_stride, column, PIECE, COLUMNS)
    return tl.load(chain + offsets, mask=moves, other=0), moves


@triton.jit
def _move_chain(
    table, tensor, batches, heads, slots, indices, index_layer, index_batch, index_head,
    counts, count_layer, count_batch, count_head,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A chain's rows forward, tile by tile; while one is written the next is under way.

    Indices ascend, so a row lies at its slot or behind it, and a tile's rows lie at or behind its
    first slot: no tile overwrites what a later one reads. Within a tile reads come before writes.
    """
    row_size = _entry(table.row_size, tensor)
    side_by_side = tl.cdiv(row_size, COLUMNS).to(tl.int32)
    column = tl.program_id(0) % side_by_side * COLUMNS
    number = (tl.program_id(0) // side_by_side).to(tl.int64)
    batch = number // heads
    head = number % heads
    if batch < batches:  # not all tensors have as many slabs of columns
        layer = _entry(table.layer, tensor)
        at = layer * count_layer + batch * count_batch + head * count_head
        count = _count_of_chain(counts, at, slots)
        indices += layer * index_layer + batch * index_batch + head * index_head
        source = _source(table, tensor, batch, head)
        chain = _pointer(source, PIECE)
        row_stride = _entry(table.row_stride, tensor)
        inside = _inside(column, row_size, PIECE, COLUMNS)
        slot = tl.arange(0, ROWS)
        tile, moves = _read_tile(
            chain, row_stride, column, inside, indices, slot, count, PIECE, COLUMNS
        )
        for begin in range(0, count, ROWS):
            slot = begin + tl.arange(0, ROWS)
            next_tile, next_moves = _read_tile(
                chain, row_stride, column, inside, indices, slot + ROWS, count, PIECE, COLUMNS
            )
            tl.debug_barrier()  # all have read the tile
            offsets = _offsets(slot * row_stride, column, PIECE, COLUMNS)
            tl.store(chain + offsets, tile, mask=moves)
            tile = next_tile
            moves = next_moves


_LENGTHS_AND_STRIDES = [
    *("batches", "heads", "slots", "index_layer", "index_batch", "index_head"),
    *("count_layer", "count_batch", "count_head"),
]


@triton.jit(do_not_specialize=_LENGTHS_AND_STRIDES)
def _copy_rows(
    table, batches, heads, slots, indices, index_layer, index_batch, index_head,
    counts, count_layer, count_batch, count_head, ALIGN_RIGHT: tl.constexpr, SHAPES: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(1)
    shape = _entry(table.shape, tensor)
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _copy_tile(
                table, tensor, batches, heads, slots,
                indices, index_layer, index_batch, index_head,
                counts, count_layer, count_batch, count_head,
                ALIGN_RIGHT, SHAPES[i][0], SHAPES[i][1], SHAPES[i][2],
            )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS_AND_STRIDES)
def _move_rows(
    table, batches, heads, slots, indices, index_layer, index_batch, index_head,
    counts, count_layer, count_batch, count_head, SHAPES: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(1)
    shape = _entry(table.shape, tensor)
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _move_chain(
                table, tensor, batches, heads, slots,
                indices, index_layer, index_batch, index_head,
                counts, count_layer, count_batch, count_head,
                SHAPES[i][0], SHAPES[i][1], SHAPES[i][2],
            )  # fmt: skip


# --- launches -------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A tensor [B, heads, S, ...] of rows and where they go. In bytes, strides of the source."""

    source: int
    target: int
    row_size: int
    batch_stride: int
    head_stride: int
    row_stride: int
    layer: int


def move_of(source: Tensor, target: Tensor, layer: int) -> Move:
    """`source` has no gaps within its rows."""
    batch, heads, length, *row = source.shape
    batch_stride, head_stride, row_stride = source.stride()[:3]
    size = source.element_size()
    return Move(
        source.data_ptr(),
        target.data_ptr(),
        math.prod(row) * size,
        # With fewer than two entries in a dimension its stride says nothing.
        batch_stride * size if batch > 1 else 0,
        head_stride * size if heads > 1 else 0,
        row_stride * size if length > 1 else 0,
        layer,
    )


def copy_rows(
    moves: list[Move], indices: Tensor, counts: Tensor | None, align_right: bool = False
) -> None:
    """Copies rows to contiguous tensors [B, heads, K, ...].

    indices [L, B, heads, K], stride 1 in the last dimension; counts [L, B, heads]. No size is 0.
    """
    _, batch, heads, slots = indices.shape
    for table, shapes, tensors in _launches(moves, row_bytes=512 * SCALE, tile_pieces=1024 * SCALE):
        tiles = max(_blocks(slots, shape.rows) * n for shape, n in shapes.items())
        _copy_rows[batch * heads * tiles, tensors](
            table,
            *_rows(indices, counts),
            ALIGN_RIGHT=align_right,
            SHAPES=tuple(shapes),
            num_warps=WARPS,
        )


def move_rows(moves: list[Move], indices: Tensor, counts: Tensor | None) -> None:
    """Moves rows forward within their storage. No size is 0."""
    _, batch, heads, _ = indices.shape
    # A cache line is enough of a row to make many programs of even a few heads.
    for table, shapes, tensors in _launches(moves, row_bytes=128 * SCALE, tile_pieces=512 * SCALE):
        _move_rows[batch * heads * max(shapes.values()), tensors](
            table,
            *_rows(indices, counts),
            SHAPES=tuple(shapes),
            num_warps=WARPS,
        )


def _rows(indices: Tensor, counts: Tensor | None) -> tuple:
    count_strides = (0, 0, 0) if counts is None else counts.stride()
    return *indices.shape[1:], indices, *indices.stride()[:3], counts, *count_strides


def _launches(
    moves: list[Move], row_bytes: int, tile_pieces: int
) -> Iterator[tuple[Table, dict[TileShape, int], int]]:
    """Tables, the tile shapes with how many tiles lie side by side on a row, at most, and how many
    tensors there are. Tiles have `tile_pieces` pieces and cover up to `row_bytes` of a row."""
    for first in range(0, len(moves), MOST_TENSORS):
        some = moves[first : first + MOST_TENSORS]
        shapes: dict[TileShape, int] = {}
        lines = []
        for *sizes, layer in some:
            piece = _widest_piece(sizes)
            if piece > 1:
                sizes = [x // piece for x in sizes]
            row_size = sizes[2]
            columns = min(1 << (row_size - 1).bit_length(), row_bytes // piece, LANES)
            shape = TileShape(piece, tile_pieces // columns, columns)
            shapes[shape] = max(shapes.get(shape, 0), _blocks(row_size, columns))
            lines.append((*sizes, layer, list(shapes).index(shape)))
        table = Table(*map(_column, zip(*lines, strict=True)))
        yield table, shapes, len(some)


def _widest_piece(sizes: list[int]) -> int:
    """A power of two up to 16 bytes that divides all sizes."""
    bits = 16
    for size in sizes:
        bits |= size
    return bits & -bits


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


def _column(entries: tuple[int, ...]) -> tuple[int, ...]:
    if entries.count(entries[0]) == len(entries):
        entries = entries[:1]
    return tuple(_WIDE | entry << 1 | 1 for entry in entries)
