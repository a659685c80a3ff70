"""compact_rows: copies of rows, both alignments, every bit."""

import math

import pytest
import torch

import vtp_kernels as vtp

OP = "compact_rows"


def bits(x):
    """The same memory as integers: NaN compares equal to itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x if x.dtype == torch.bool else x.contiguous().view(integers[x.element_size()])


def expected(x, indices, counts, align):
    batch, width = indices.shape
    out = torch.zeros(batch, width, *x.shape[2:], dtype=x.dtype, device=x.device)
    for b in range(batch):
        count = width if counts is None else int(counts[b])
        start = 0 if align == "left" else width - count
        for j in range(count):
            out[b, start + j] = x[b, indices[b, j]]
    return out


def check(tensors, indices, counts, backend):
    for align in ("left", "right"):
        got = vtp.compact_rows(tensors, indices, counts, align=align, backend=backend)
        assert isinstance(got, tuple) and len(got) == len(tensors)
        for x, new in zip(tensors, got, strict=True):
            want = expected(x, indices, counts, align)
            assert new.dtype == x.dtype and new.shape == want.shape
            assert torch.equal(bits(new), bits(want))


def sequence(draw, batch, length):
    """What travels with a sequence: hidden states, positions, masks, cos/sin, ids."""
    hidden = draw.normal(batch, length, 24)
    hidden[..., 3] = math.nan
    return [
        hidden,
        draw.normal(batch, length, 16, dtype=torch.bfloat16),
        draw.normal(batch, length, 2, 5, dtype=torch.float16),
        draw.normal(batch, length, dtype=torch.float64),
        draw.integers(-9, 9, batch, length),
        draw.integers(-9, 9, batch, length, 3, dtype=torch.int32),
        draw.integers(-9, 9, batch, length, dtype=torch.int8),
        draw.bools(batch, length),
    ]


def test_more_tensors_than_a_launch_takes(draw, backend):
    tensors = [draw.normal(2, 9, 1 + i % 7) for i in range(200)]
    check(tensors, *draw.rows(2, 9, 5), backend)


@pytest.mark.parametrize("length", (0, 1, 31, 576, 577, 2880))
def test_lengths(draw, backend, length):
    tensors = sequence(draw, 2, length)
    for width in {0, 1, length // 9, length, length + 3}:
        check(tensors, *draw.rows(2, length, width), backend)


def test_ten_thousand_rows(draw, backend):
    check([draw.normal(1, 10000, 64)], *draw.rows(1, 10000, 10000), backend)


def test_all_rows_real(draw, backend):
    indices = torch.arange(0, 40, 4, device=draw.device).expand(3, -1)
    check(sequence(draw, 3, 40), indices, None, backend)


def test_tail_may_hold_anything(draw, backend):
    indices = torch.tensor([[1, 2, 10**12, -5], [-(10**12), 7, 7, 7]], device=draw.device)
    check(sequence(draw, 2, 9), indices, torch.tensor([2, 0], device=draw.device), backend)


def test_strides(draw, backend):
    base = draw.normal(2, 50, 40)
    tensors = [
        base[:, 5:45, 1:],  # misaligned
        base[:, 5:45, ::2],  # last stride 2
        base.transpose(1, 2),  # [2, 40, 50]
        base[:1, :40].expand(2, -1, -1),
        draw.normal(40, 2, 6, 8).permute(1, 0, 3, 2),
        draw.integers(0, 99, 40, 2).t(),
        draw.bools(2, 80)[:, ::2],
    ]
    check(tensors, *draw.rows(2, 40, 17), backend)


def test_order_of_indices_tensor_does_not_matter(draw, backend):
    """Indices that are no contiguous memory themselves."""
    indices, counts = draw.rows(3, 40, 12)
    check(sequence(draw, 3, 40), indices.t().contiguous().t(), counts, backend)


def test_empty(draw, backend):
    assert vtp.compact_rows([], draw.rows(2, 5, 3)[0], backend=backend) == ()
    check(sequence(draw, 0, 9), *draw.rows(0, 9, 4), backend)
    check([draw.normal(2, 9, 0)], *draw.rows(2, 9, 4), backend)


X = torch.zeros(2, 10, 4)
ROWS = torch.tensor([[0, 3, 9], [1, 2, 3]])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tensors": ["x"]}, TypeError, r"tensors\[0\] must be a tensor .* got str"),
        ({"tensors": [X[0]]}, ValueError, r"tensors\[0\] must have shape \[B, S, ...\]"),
        ({"tensors": [X[0, :, 0]]}, ValueError, r"tensors\[0\] must have shape"),
        ({"tensors": [X, X[:, :9]]}, ValueError, r"tensors\[1\] must have shape"),
        ({"tensors": [X.to("meta")]}, ValueError, r"tensors\[0\] must be on cpu"),
        ({"indices": ROWS[0]}, ValueError, r"indices must have shape \[B, K\]"),
        ({"indices": ROWS.int()}, TypeError, "indices must be int64"),
        ({"counts": torch.tensor([1])}, ValueError, r"counts must have shape \[B\]"),
        ({"counts": torch.tensor([1.0, 2.0])}, TypeError, "counts must be int32 or int64"),
        ({"counts": torch.tensor([1, 9])}, ValueError, r"counts must be within \[0, 3\]"),
        ({"indices": ROWS + 1}, ValueError, r"within \[0, 10\), got 10 at \[0, 2\]"),
        ({"indices": ROWS - 1}, ValueError, r"within \[0, 10\), got -1 at \[0, 0\]"),
        ({"indices": ROWS.flip(1)}, ValueError, "indices must ascend strictly"),
        ({"align": "center"}, ValueError, "align must be one of .* got 'center'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"tensors": [X], "indices": ROWS, **change}
    with pytest.raises(error, match=message):
        vtp.compact_rows(**arguments)
