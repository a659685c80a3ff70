"""select_topk against Python's own stable sort: the selected set must be equal, not close."""

import math

import pytest
import torch

import vtp_kernels as vtp

OP = "select_topk"
LENGTHS = (0, 1, 31, 576, 577, 2880, 10000)
NAN, INF = math.nan, math.inf


def expected(scores, k, candidates=None, keep=None, threshold=None, capacity=None):
    """Rows of chosen indices, from a stable sort by (score descending, index ascending)."""
    rows = []
    for b, row in enumerate(scores.double().tolist()):

        def rank(i, row=row):
            return (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)

        kept = [i for i in range(len(row)) if keep is not None and keep[b, i]]
        competing = [
            i
            for i in range(len(row))
            if (candidates is None or candidates[b, i])
            and (keep is None or not keep[b, i])
            and (threshold is None or row[i] > threshold)
        ]
        row_k = max(0, int(k[b]) if isinstance(k, torch.Tensor) else k)
        chosen = sorted(kept, key=rank) + sorted(competing, key=rank)[:row_k]
        rows.append(sorted(chosen if capacity is None else chosen[:capacity]))
    return rows


def check(selection, rows, capacity):
    indices, counts = selection
    assert indices.dtype == torch.int64 and counts.dtype == torch.int32
    assert indices.shape == (len(rows), capacity)
    assert counts.tolist() == [len(row) for row in rows]
    assert indices.tolist() == [row + [-1] * (capacity - len(row)) for row in rows]


def curves(draw, length):
    """Rows that are hard to rank, [12, length] float32."""
    base = draw.normal(length)
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-42], device=draw.device)
    mixed = torch.where(
        draw.bools(length, p=0.3), special[draw.integers(0, len(special), length)], base
    )
    negative_nan = torch.full_like(base, NAN).view(torch.int32).bitwise_or(-(2**31))
    return torch.stack(
        [
            base,
            torch.full_like(base, 0.25),
            draw.integers(0, 3, length).float(),
            torch.full_like(base, NAN),
            negative_nan.view(torch.float32),
            torch.where(draw.bools(length), NAN, base),
            torch.where(draw.bools(length), INF, -INF).to(base),
            torch.where(draw.bools(length), 0.0, -0.0).to(base),
            draw.integers(-40, 40, length).float() * 2.0**-149,  # subnormal
            draw.uniform(length) * 1e-5,  # mean probabilities: equal in their leading bits
            base.to(torch.bfloat16).float(),
            mixed,
        ]
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_a_stable_sort(draw, backend, length):
    scores = curves(draw, length)
    for k in {0, 1, length // 9, max(length - 1, 0), length, length + 3}:
        selection = vtp.select_topk(scores, k, backend=backend)
        check(selection, expected(scores, k), min(k, length))


def test_candidates_keep_threshold_capacity(draw, backend):
    for _ in range(60):
        length = draw.integer(1, 80)
        scores = curves(draw, length)
        batch = scores.shape[0]
        candidates = draw.bools(batch, length, p=0.7) if draw.bools(1) else None
        keep = draw.bools(batch, length, p=0.2) if draw.bools(1) else None
        threshold = [None, 0.0, 0.25, -INF, INF, NAN][draw.integer(0, 6)]
        capacity = draw.integer(0, length + 5) if draw.bools(1) else None
        k = draw.integer(0, length + 2)
        options = {"candidates": candidates, "keep": keep, "threshold": threshold}
        selection = vtp.select_topk(scores, k, **options, capacity=capacity, backend=backend)
        width = capacity
        if width is None:
            width = length if keep is not None else min(k, length)
        check(selection, expected(scores, k, **options, capacity=width), width)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_k_per_row(draw, backend, dtype):
    scores = curves(draw, 97)
    k = draw.integers(-2, 110, scores.shape[0], dtype=dtype)
    keep = draw.bools(*scores.shape, p=0.1)
    selection = vtp.select_topk(scores, k, keep=keep, capacity=60, backend=backend)
    check(selection, expected(scores, k, keep=keep, capacity=60), 60)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(draw, backend, dtype):
    scores = curves(draw, 577).to(dtype)
    check(vtp.select_topk(scores, 64, backend=backend), expected(scores, 64), 64)


@pytest.mark.parametrize("dtype", (torch.float64,))
def test_float64_is_not_rounded(backend, device, dtype):
    scores = torch.tensor([[1.0, 1.0 + 2.0**-40, 1.0]], dtype=dtype, device=device)
    check(vtp.select_topk(scores, 1, backend=backend), [[1]], 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
def test_a_threshold_is_not_rounded_to_16_bits(draw, backend, device, dtype):
    """It is compared in float32, or in float64: a neighbour of a score is above or below it."""
    scores = torch.tensor([[0.1, 0.10009765625, 0.0999755859375]], dtype=dtype, device=device)
    above = {torch.float16: 1, torch.bfloat16: 3, torch.float32: 1, torch.float64: 1}[dtype]
    assert vtp.select_topk(scores, 3, threshold=0.1, backend=backend).counts.item() == above
    step = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in range(20):
        scores = draw.normal(3, 40).to(dtype)
        score = scores[0, draw.integer(0, 40)].to(step)
        for way in (-INF, score.item(), INF):
            threshold = torch.nextafter(score, torch.full_like(score, way)).item()
            selection = vtp.select_topk(scores, 40, threshold=threshold, backend=backend)
            check(selection, expected(scores, 40, threshold=threshold, capacity=40), 40)
    selection = vtp.select_topk(scores, 40, threshold=-(2**70), backend=backend)
    assert selection.counts.tolist() == [40] * 3


def test_strides(draw, backend):
    wide = curves(draw, 201)
    candidates = draw.bools(*wide.shape, p=0.6)
    for view in (
        (slice(None), slice(1, None)),  # misaligned
        (slice(None, None, 2), slice(3, 150)),
        (slice(None), slice(None, None, 2)),  # last stride 2
        (slice(None, None, 3), slice(None, None, 3)),
    ):
        scores, mask = wide[view], candidates[view]
        selection = vtp.select_topk(scores, 20, candidates=mask, backend=backend)
        check(selection, expected(scores, 20, mask, capacity=20), 20)
    transposed = wide.t().contiguous().t()
    check(vtp.select_topk(transposed, 20, backend=backend), expected(wide, 20), 20)
    row = wide[:1].expand(5, -1)
    check(vtp.select_topk(row, 20, backend=backend), expected(row, 20), 20)


def test_rows_without_candidates(draw, backend):
    scores = draw.normal(3, 40)
    candidates = torch.zeros_like(scores, dtype=torch.bool)
    candidates[1, 7] = True
    check(vtp.select_topk(scores, 5, candidates=candidates, backend=backend), [[], [7], []], 5)


def test_empty_batch(draw, backend):
    check(vtp.select_topk(draw.normal(0, 12), 4, backend=backend), [], 4)


def test_kept_rows_survive_a_small_capacity(backend, device):
    scores = torch.tensor([[5.0, 1.0, 4.0, NAN, 3.0, 2.0]], device=device)
    keep = torch.tensor([[False, True, False, True, False, True]], device=device)
    for capacity, row in ((0, []), (1, [5]), (2, [1, 5]), (3, [1, 3, 5]), (4, [0, 1, 3, 5])):
        selection = vtp.select_topk(scores, 2, keep=keep, capacity=capacity, backend=backend)
        check(selection, [row], capacity)


def test_repeats_bit_for_bit(draw, backend):
    scores = curves(draw, 2880)
    first = vtp.select_topk(scores, 300, backend=backend)
    second = vtp.select_topk(scores, 300, backend=backend)
    assert torch.equal(first.indices, second.indices) and torch.equal(first.counts, second.counts)


MASK = torch.ones(2, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scores": [[1.0]]}, TypeError, "scores must be a tensor .* got list"),
        ({"scores": torch.zeros(9)}, ValueError, r"scores must have shape \[B, S\].* got \[9\]"),
        ({"scores": torch.zeros(2, 9, dtype=torch.int64)}, TypeError, "scores must be .*int64"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 1.5}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"k": torch.tensor([1, 2])}, ValueError, "capacity must be given when k is a tensor"),
        ({"k": torch.tensor([1]), "capacity": 3}, ValueError, r"k must have shape \[B\]"),
        ({"k": torch.tensor([1.0, 2.0]), "capacity": 3}, TypeError, "k must be int32 or int64"),
        ({"capacity": -1}, ValueError, "capacity must be at least 0"),
        ({"candidates": MASK[:, :8]}, ValueError, r"candidates must have shape .*\[2, 8\]"),
        ({"candidates": MASK.int()}, TypeError, "candidates must be bool, got int32"),
        ({"candidates": MASK.to("meta")}, ValueError, "candidates must be on cpu, got meta"),
        ({"keep": MASK[:1]}, ValueError, r"keep must have shape .*\[1, 9\]"),
        ({"keep": MASK.float()}, TypeError, "keep must be bool"),
        ({"threshold": "0"}, TypeError, "threshold must be a number, got str"),
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"scores": torch.zeros(2, 9), "k": 3, **change}
    with pytest.raises(error, match=message):
        vtp.select_topk(**arguments)
