"""attention_topk: bit for bit select_topk of attention_scores, and the right tokens by float64."""

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import reference

OP = "attention_topk"


def inputs(draw, batch=2, heads=4, kv_heads=2, rows=3, length=50, dim=64, dtype=torch.float32):
    return {
        "query": draw.normal(batch, heads, rows, dim, dtype=dtype),
        "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "candidates": draw.bools(batch, length, p=0.7),
        "valid": draw.bools(batch, length, p=0.9),
        "query_positions": draw.integers(0, length + 1, batch, rows),
        "query_valid": draw.bools(batch, rows, p=0.8),
    }


def check(arguments, k, backend, *, selecting=None, scoring=None):
    """Compares with the two ops it is made of."""
    selecting, scoring = selecting or {}, scoring or {}
    selection, scores = vtp.attention_topk(
        **arguments, k=k, **selecting, **scoring, backend=backend
    )
    want_scores = vtp.attention_scores(**arguments, **scoring, backend=backend)
    want = vtp.select_topk(
        want_scores, k, candidates=arguments["candidates"], **selecting, backend=backend
    )
    assert scores.dtype == want_scores.dtype
    assert torch.equal(scores, want_scores)
    assert torch.equal(selection.indices, want.indices)
    assert torch.equal(selection.counts, want.counts)
    return selection, scores


@pytest.mark.parametrize("length", (0, 1, 31, 576, 577, 2880, 10000))
@pytest.mark.parametrize("rows", (1, 5))
def test_is_the_two_ops(draw, backend, length, rows):
    arguments = inputs(draw, rows=rows, length=length)
    for k in {0, 1, length // 9, max(length - 1, 0), length, length + 3}:
        check(arguments, k, backend)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_dtypes(draw, backend, dtype):
    check(inputs(draw, length=577, dtype=dtype), 64, backend)


@pytest.mark.parametrize("kv_heads, group", ((4, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("dim", (64, 80, 96, 128, 256))
def test_heads_and_dims(draw, backend, kv_heads, group, dim):
    check(inputs(draw, heads=kv_heads * group, kv_heads=kv_heads, dim=dim), 9, backend)


def test_options(draw, backend):
    arguments = inputs(draw, length=90)
    keep = draw.bools(2, 90, p=0.1)
    k = draw.integers(0, 20, 2)
    for head_reduce in ("mean", "max", "sum"):
        for support in ("all", "candidates"):
            scoring = {"head_reduce": head_reduce, "support": support, "scale": 0.2}
            check(arguments, 7, backend, scoring=scoring, selecting={"keep": keep})
            selecting = {"keep": keep, "capacity": 15, "threshold": 0.005}
            check(arguments, k, backend, scoring=scoring, selecting=selecting)
    lse = draw.normal(2, 4, 3)
    check(arguments, 7, backend, scoring={"lse": lse}, selecting={"capacity": 120})


def test_strides(draw, backend):
    arguments = inputs(draw, length=64)
    arguments["key"] = draw.normal(2, 64, 2, 64).transpose(1, 2)
    arguments["query"] = draw.normal(2, 4, 3, 128)[..., ::2]
    arguments["candidates"] = draw.bools(2, 128)[:, ::2]
    check(arguments, 9, backend)


@pytest.mark.parametrize("rows, length, k", ((1, 640, 64), (17, 1500, 100)))
def test_selects_what_float64_selects(draw, backend, rows, length, k):
    """Tokens chosen otherwise than by float64 must tie within 1e-6 of the cut's score."""
    arguments = inputs(draw, heads=8, kv_heads=8, rows=rows, length=length)
    arguments["query_valid"][:, 0] = True
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    (want, counts), exact = reference.attention_topk(**wide, k=k)
    (got, got_counts), _ = vtp.attention_topk(**arguments, k=k, backend=backend)
    assert torch.equal(got_counts, counts)
    for b in range(2):
        chosen = set(want[b, : counts[b]].tolist())
        cut = min(exact[b, i].item() for i in chosen)
        for i in chosen ^ set(got[b, : counts[b]].tolist()):
            assert abs(exact[b, i].item() - cut) <= 1e-6 * cut


def test_all_padding(draw, backend):
    arguments = inputs(draw, length=30)
    arguments["valid"][:] = False
    selection, scores = check(arguments, 4, backend)
    assert torch.equal(scores, torch.zeros_like(scores))
    assert selection.counts.tolist() == [4, 4]  # candidates compete, with score 0


def test_empty_batch(draw, backend):
    check(inputs(draw, batch=0), 4, backend)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": -1}, ValueError, "k must be at least 0"),
        ({"k": None}, TypeError, "k must be an int"),
        ({"k": torch.tensor([1, 2])}, ValueError, "capacity must be given"),
        ({"keep": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "keep must have shape"),
        ({"capacity": 2.0}, TypeError, "capacity must be an int"),
        ({"threshold": None, "capacity": -2}, ValueError, "capacity must be at least 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 2, 5, 8),
        "candidates": torch.ones(2, 5, dtype=torch.bool),
        "k": 2,
        **change,
    }
    with pytest.raises(error, match=message):
        vtp.attention_topk(**arguments)
