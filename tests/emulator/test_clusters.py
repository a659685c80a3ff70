"""Rows that a cluster of blocks shares get the same tokens, bit for bit, as rows of one block."""

import pytest
import torch

from emulator import build, cases

MOST_ROWS = 16  # clusters at once, on the emulator
IN_CLUSTERS = {op: f"{op} in clusters" for op in cases.ARCHITECTURES}
NAN, INF = torch.nan, torch.inf


@pytest.fixture
def run(kernels):
    """A function that runs an op for an architecture: its results, and whether in clusters."""

    def run(op, arguments, architecture=90):
        before = kernels.launches().get(IN_CLUSTERS[op], 0)
        with build.architecture(kernels, architecture):
            results = getattr(torch.ops.vtp_kernels_emulated, op)(*arguments)
        return results, kernels.launches().get(IN_CLUSTERS[op], 0) > before

    return run


def check(run, op, arguments):
    """Runs it both ways."""
    results, in_clusters = run(op, arguments)
    expected, before_clusters = run(op, arguments, 80)
    assert in_clusters and not before_clusters
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


def rows(draw, length):
    """[8, length] scores that are hard to rank, or whose blocks have nothing in common."""
    base = draw.normal(length)
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-42])
    mixed = torch.where(draw.bools(length, p=0.3), special[draw.integers(0, 6, length)], base)
    return torch.stack(
        [
            base,
            mixed,
            torch.full_like(base, 0.25),
            torch.full_like(base, NAN),
            draw.integers(0, 3, length).float(),
            (base * 6).exp(),
            draw.uniform(length) * 1e-5,
            torch.linspace(1.0, 2.0, length),
        ]
    )


@pytest.mark.parametrize("length", (4097, 16384))
def test_select_topk(run, draw, order, length):
    scores = rows(draw, length)
    batch = len(scores)
    candidates, keep = draw.bools(batch, length, p=0.6), draw.bools(batch, length, p=0.05)
    candidates[:, : length // 2] = False  # four blocks have nothing
    per_row = draw.integers(-1, length, batch, dtype=torch.int32)
    for arguments in (
        (scores, None, draw.integer(1, length), None, None, None, length),
        (scores, per_row, 0, candidates, None, None, 1000),
        (scores.bfloat16(), None, 100, candidates, keep, 0.0, length),
        (scores, None, 100, candidates, keep, None, 10),  # fewer than are kept
        (scores, None, 0, None, None, None, 7),
    ):
        check(run, "select_topk", arguments)


def attention(draw, length, heads, kv_heads, rows, k=50, reduce="mean", keep=None, per_row=None):
    batch, dim = 2, 64
    valid = draw.bools(batch, length, p=0.9)
    key = draw.normal(batch, kv_heads, length, dim)
    return (
        draw.normal(batch, heads, rows, dim),
        key.masked_fill_(~valid[:, None, :, None], NAN),
        *(per_row, k, draw.bools(batch, length, p=0.7), valid),
        draw.integers(length // 2, length, batch, rows),
        draw.bools(batch, rows, p=0.8),
        *(None, dim**-0.5, "all", reduce, keep, None, 60),
    )


@pytest.mark.parametrize(
    "length, heads, kv_heads, rows",
    [
        (1, 1, 1, 1),
        (100, 4, 2, 1),
        (640, 32, 32, 1),
        (1300, 12, 6, 8),  # more tiles than one thread merges, more rows than threads at a time
        (2500, 3, 1, 17),  # columns
    ],
)
def test_attention_topk(run, draw, length, heads, kv_heads, rows):
    check(run, "attention_topk", attention(draw, length, heads, kv_heads, rows))
    options = {"reduce": "max", "keep": draw.bools(2, length, p=0.1)}
    per_row = draw.integers(0, length + 1, 2)
    check(
        run,
        "attention_topk",
        attention(draw, length, heads, kv_heads, rows, per_row=per_row, **options),
    )


def test_logits_that_are_not_finite(run, draw):
    arguments = list(attention(draw, 300, 4, 2, 2))
    for value in (NAN, INF, -INF):
        key = arguments[1].clone()
        key[:, :, 7] = value
        check(run, "attention_topk", [arguments[0], key, *arguments[2:]])


def test_who_takes_clusters(run, draw):
    """Rows too long, short enough for one block, or too many for all to run at once do not."""

    def takes(batch, length):
        scores = draw.normal(batch, length)
        return run("select_topk", (scores, None, 3, None, None, None, 3))[1]

    assert takes(MOST_ROWS, 4097) and takes(1, 16384)
    assert not takes(MOST_ROWS + 1, 4097)
    assert not takes(1, 4096) and not takes(1, 16385)
    assert not takes(0, 5000)
