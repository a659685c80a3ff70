"""compact_kv: copies, so every bit must be right, and nothing else may change."""

import math

import pytest
import torch

import vtp_kernels as vtp

OP = "compact_kv"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


def bits(x):
    """The same memory as integers: NaN compares equal to itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()])


def cache(draw, lengths, batch=2, heads=3, dim=16, dtype=torch.float32):
    def layer(length):
        x = draw.normal(batch, heads, length, dim) * 50
        x[..., :1] = torch.where(draw.bools(batch, heads, length, 1, p=0.1), math.nan, x[..., :1])
        x[..., 1:2] = torch.where(draw.bools(batch, heads, length, 1), -0.0, x[..., 1:2])
        return x.nan_to_num().to(dtype) if dtype == torch.int8 else x.to(dtype)

    return [layer(n) for n in lengths], [layer(n) for n in lengths]


def expected(x, layer, indices, counts):
    """One layer's rows, copied one by one."""
    batch, heads, _, dim = x.shape
    width = indices.shape[-1]
    out = torch.zeros(batch, heads, width, dim, dtype=x.dtype, device=x.device)
    for b in range(batch):
        for h in range(heads):
            where = {2: (b,), 3: (layer, b), 4: (layer, b, h)}[indices.dim()]
            count = width if counts is None else int(counts[where])
            for j in range(count):
                out[b, h, j] = x[b, h, indices[where][j]]
    return out


def check(keys, values, indices, counts, backend):
    """Out of place against loops, in place against out of place."""
    before = [x.clone() for x in (*keys, *values)]
    new_keys, new_values = vtp.compact_kv(keys, values, indices, counts, backend=backend)
    for i, (x, new) in enumerate(zip((*keys, *values), (*new_keys, *new_values), strict=True)):
        assert torch.equal(bits(x), bits(before[i]))
        want = expected(x, i % len(keys), indices, counts)
        assert new.dtype == x.dtype and torch.equal(bits(new), bits(want))
    compacted = vtp.compact_kv(
        [x.clone() for x in keys],
        [x.clone() for x in values],
        indices,
        counts,
        in_place=True,
        backend=backend,
    )
    outside = (*new_keys, *new_values)
    for i, x in enumerate((*compacted[0], *compacted[1])):
        assert_moved(before[i], x, outside[i], i % len(keys), indices, counts)


def assert_moved(before, after, new, layer, indices, counts):
    """Rows below the count equal those made out of place; all others are as they were."""
    want = before.clone()
    for b in range(before.shape[0]):
        for h in range(before.shape[1]):
            where = {2: (b,), 3: (layer, b), 4: (layer, b, h)}[indices.dim()]
            count = indices.shape[-1] if counts is None else int(counts[where])
            want[b, h, :count] = new[b, h, :count]
    assert torch.equal(bits(after), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 7, 72, 80, 128, 264))
def test_dtypes_and_dims(draw, backend, dtype, dim):
    keys, values = cache(draw, (40, 40), dim=dim, dtype=dtype)
    check(keys, values, *draw.rows(2, 40, 25), backend)


@pytest.mark.parametrize("length", (0, 1, 31, 576, 577, 2880))
def test_lengths(draw, backend, length):
    keys, values = cache(draw, (length,) * 2, batch=2, heads=2, dim=8)
    for width in {0, 1, length // 9, length, length + 3}:
        check(keys, values, *draw.rows(2, length, width), backend)


def test_ten_thousand_rows(draw, backend):
    keys, values = cache(draw, (10000,), batch=1, heads=1, dim=64)
    check(keys, values, *draw.rows(1, 10000, 10000), backend)


def test_indices_per_layer(draw, backend):
    keys, values = cache(draw, (30, 30, 30))
    indices, counts = draw.rows(6, 30, 14)
    check(keys, values, indices.view(3, 2, 14), counts.view(3, 2), backend)


def test_indices_per_head(draw, backend):
    keys, values = cache(draw, (30, 30))
    indices, counts = draw.rows(12, 30, 14)
    check(keys, values, indices.view(2, 2, 3, 14), counts.view(2, 2, 3), backend)


def test_layers_of_other_lengths(draw, backend):
    keys, values = cache(draw, (50, 17, 33))
    check(keys, values, *draw.rows(2, 17, 9), backend)
    indices, counts = zip(*(draw.rows(2, n, 15) for n in (50, 17, 33)), strict=True)
    check(keys, values, torch.stack(indices), torch.stack(counts), backend)


def test_all_rows_real(draw, backend):
    keys, values = cache(draw, (30,))
    indices = torch.stack([torch.arange(0, 30, 3), torch.arange(10, 20)]).to(draw.device)
    check(keys, values, indices, None, backend)
    check(keys, values, torch.arange(30, device=draw.device).expand(2, -1), None, backend)


def test_tail_may_hold_anything(draw, backend):
    keys, values = cache(draw, (30,))
    indices = torch.tensor([[1, 2, 10**12, -5], [-(10**12), 7, 7, 7]], device=draw.device)
    counts = torch.tensor([2, 0], device=draw.device)  # int64 counts are welcome, too
    check(keys, values, indices, counts, backend)


def test_in_place_within_a_static_cache(draw, backend):
    """Views of longer, shared buffers: what lies around the views keeps every bit."""
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):  # [B, H, S, D] memory and [B, S, H, D] memory
        shape = [2, 3, 60, 24]
        buffers = [draw.normal(*(shape[i] for i in order)).permute(order) for _ in range(4)]
        before = [x.clone() for x in buffers]
        views = [x[:, :, 4:45, 3:20] for x in buffers]  # misaligned
        indices, counts = draw.rows(2, 41, 30)
        new = vtp.compact_kv(views[:2], views[2:], indices, counts, backend=backend)
        got = vtp.compact_kv(views[:2], views[2:], indices, counts, in_place=True, backend=backend)
        assert all(a is b for a, b in zip((*got[0], *got[1]), views, strict=True))
        for i, x in enumerate((*new[0], *new[1])):
            want = before[i]
            for b, count in enumerate(counts.tolist()):
                want[b, :, 4 : 4 + count, 3:20] = x[b, :, :count]
            assert torch.equal(buffers[i], want)


def test_last_stride_two_is_copied(draw, backend):
    wide = [draw.normal(2, 3, 20, 32) for _ in range(2)]
    keys, values = [wide[0][..., ::2]], [wide[1][..., ::2]]
    indices, counts = draw.rows(2, 20, 9)
    got = vtp.compact_kv(keys, values, indices, counts, backend=backend)
    assert torch.equal(got[0][0], expected(keys[0], 0, indices, counts))
    assert torch.equal(got[1][0], expected(values[0], 0, indices, counts))


def test_empty(draw, backend):
    assert vtp.compact_kv([], [], draw.rows(2, 5, 3)[0], backend=backend) == ((), ())
    keys, values = cache(draw, (9,), batch=0)
    check(keys, values, *draw.rows(0, 9, 4), backend)


X = torch.zeros(2, 3, 10, 4)
ROWS = torch.tensor([[0, 3, 9], [1, 2, 3]])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"values": []}, ValueError, "values must have as many layers as keys, 1, got 0"),
        ({"keys": [X[0]]}, ValueError, r"keys\[0\] must have shape \[B, Hkv, S, D\]"),
        ({"keys": ["k"]}, TypeError, r"keys\[0\] must be a tensor .* got str"),
        ({"values": [X[:, :, :9]]}, ValueError, r"values\[0\] must have shape"),
        ({"values": [X.half()]}, TypeError, r"values\[0\] must be float32, got float16"),
        ({"values": [X.to("meta")]}, ValueError, r"values\[0\] must be on cpu, got meta"),
        ({"keys": [X, X[:1]], "values": [X, X[:1]]}, ValueError, r"keys\[1\] must have shape"),
        ({"indices": [[0]]}, TypeError, "indices must be a tensor"),
        ({"indices": ROWS[0]}, ValueError, r"indices must have shape \[B, K\] or \[L, B, K\] or"),
        ({"indices": ROWS[:1]}, ValueError, r"indices must have shape \[B, K\].* got \[1, 3\]"),
        ({"indices": ROWS.expand(2, 2, 3)}, ValueError, r"indices must have shape \[L, B, K\]"),
        ({"indices": ROWS.int()}, TypeError, "indices must be int64, got int32"),
        ({"counts": torch.tensor([3])}, ValueError, r"counts must have shape \[B\]"),
        ({"counts": torch.tensor([3.0, 1.0])}, TypeError, "counts must be int32 or int64"),
        ({"counts": torch.tensor([3, 4])}, ValueError, r"counts must be within \[0, 3\]"),
        ({"counts": torch.tensor([3, -1])}, ValueError, r"counts must be within \[0, 3\]"),
        (
            {"indices": ROWS + 1},
            ValueError,
            r"indices must be within \[0, 10\), got 10 at \[0, 2\]",
        ),
        (
            {"indices": ROWS - 1},
            ValueError,
            r"indices must be within \[0, 10\), got -1 at \[0, 0\]",
        ),
        ({"indices": ROWS.flip(1)}, ValueError, "indices must ascend strictly"),
        ({"indices": ROWS[:, [0, 1, 1]]}, ValueError, r"ascend strictly .* at \[0, 1\]"),
        (
            {"keys": [X[..., ::2]], "values": [X[..., ::2]], "in_place": True},
            ValueError,
            r"keys\[0\] must have stride 1 in its last dimension",
        ),
        (
            {"values": [X[:1].expand(2, -1, -1, -1)], "in_place": True},
            ValueError,
            r"values\[0\] must not share memory",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"keys": [X], "values": [X], "indices": ROWS, **change}
    with pytest.raises(error, match=message):
        vtp.compact_kv(**arguments)


def test_range_is_checked_against_each_layer():
    layers = [X, X[:, :, :5]]
    with pytest.raises(ValueError, match=r"within \[0, 5\), got 9"):
        vtp.compact_kv(layers, layers, ROWS)
    per_layer = torch.stack([ROWS, ROWS.clamp(max=4)])
    vtp.compact_kv(layers, layers, per_layer)
    with pytest.raises(ValueError, match=r"within \[0, 5\), got 9"):
        vtp.compact_kv(layers, layers, per_layer.flip(0))
