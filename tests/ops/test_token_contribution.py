"""token_contribution against float64; the reference (the definition) against its closed form."""

import math

import numpy as np
import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import reference

OP = "token_contribution"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(draw, batch=2, heads=4, kv_heads=2, length=50, dim=64, dtype=torch.float32):
    return {
        "query": draw.normal(batch, heads, dim, dtype=dtype),
        "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "value": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "candidates": draw.bools(batch, length, p=0.7),
        "valid": draw.bools(batch, length, p=0.9),
    }


def in_float64(arguments):
    return {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}


def check(arguments, backend, **options):
    """Compares with float64: 1e-5 relative for norms, 1e-6 absolute for cosines.

    The cosine comes from ||o||^2 - 2 alpha_j + beta_j, which cancels as o - c_j gets short: its
    error grows by (||o|| / ||o - c_j||)^2. One float32 rounding is 6e-8; 16 of them are allowed.
    """
    cosine, norm = vtp.token_contribution(**arguments, **options, backend=backend)
    want_cosine, want_norm = reference.token_contribution(**in_float64(arguments), **options)
    exact = arguments["query"].dtype == torch.float64
    assert cosine.dtype == norm.dtype == (torch.float64 if exact else torch.float32)
    tolerance = 1e-12 if exact else 1e-5
    torch.testing.assert_close(norm.double(), want_norm, rtol=tolerance, atol=1e-30)
    # ||o - c_j|| >= ||o|| - ||c_j||, from the reference
    bound = (1e-13 if exact else 1e-6) * _growth(arguments, **options)
    assert bool(((cosine.double() - want_cosine).abs() <= bound).all())


def _growth(arguments, scale=None):
    """(||o|| / ||o - c_j||)^2, at least 1, float64 [B, S]."""
    wide = in_float64(arguments)
    heads, dim = wide["query"].shape[1:]
    repeats = heads // wide["key"].shape[1]
    key, value = (wide[name].repeat_interleave(repeats, 1) for name in ("key", "value"))
    logits = (wide["query"][:, :, None] * key).sum(-1) * (dim**-0.5 if scale is None else scale)
    weights = torch.softmax(logits.masked_fill(~wide["valid"][:, None], -math.inf), -1)
    c = weights.nan_to_num()[..., None] * value
    o = c.sum(2, keepdim=True)
    whole, rest = (x.square().sum((1, 3)) for x in (o, o - c))
    return (whole / rest.clamp(min=1e-300)).clamp(min=1.0)


def closed_form(query, key, value, candidates, valid):
    """cos_j and ||c_j|| from alpha_j and beta_j (see VisiPruner), one sequence, in NumPy."""
    heads, dim = query.shape
    group = heads // key.shape[0]
    alpha, beta, total = 0.0, 0.0, 0.0
    for h in range(heads):
        logits = np.where(valid, key[h // group] @ query[h] / math.sqrt(dim), -np.inf)
        a = np.exp(logits - logits.max())
        a /= a.sum()
        v = value[h // group]
        o = a @ v
        alpha = alpha + a * (v @ o)
        beta = beta + a**2 * (v**2).sum(1)
        total += o @ o
    cosine = (total - alpha) / np.sqrt(total * (total - 2 * alpha + beta))
    return np.where(candidates, cosine, 1.0), np.where(candidates, np.sqrt(beta), 0.0)


@pytest.mark.parametrize("kv_heads, heads", ((1, 1), (2, 6), (4, 4)))
def test_reference_equals_the_closed_form(draw, kv_heads, heads):
    arguments = inputs(draw, heads=heads, kv_heads=kv_heads, length=40, dtype=torch.float64)
    cosine, norm = reference.token_contribution(**arguments)
    for b in range(2):
        want = closed_form(*(x[b].numpy() for x in arguments.values()))
        np.testing.assert_allclose(cosine[b].numpy(), want[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(norm[b].numpy(), want[1], rtol=1e-12)


@pytest.mark.parametrize("length", (1, 2, 31, 576, 577, 2880, 10000))
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(draw, backend, length, dtype):
    batch = 1 if length == 10000 else 2
    check(inputs(draw, batch=batch, length=length, dtype=dtype), backend)


@pytest.mark.parametrize("kv_heads, group", ((1, 1), (3, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("dim", (1, 7, 64, 80, 96, 128, 256))
def test_heads_and_dims(draw, backend, kv_heads, group, dim):
    check(inputs(draw, heads=kv_heads * group, kv_heads=kv_heads, length=67, dim=dim), backend)


@pytest.mark.parametrize("kv_heads, group", ((8, 5), (1, 40), (40, 1)))
def test_more_heads_than_are_compared_at_a_time(draw, backend, kv_heads, group):
    check(inputs(draw, 1, kv_heads * group, kv_heads, length=20, dim=256), backend)


def test_scale(draw, backend):
    check(inputs(draw), backend, scale=0.03)


def test_without_valid(draw, backend):
    arguments = inputs(draw)
    arguments["valid"][:] = True
    want = vtp.token_contribution(**arguments, backend=backend)
    got = vtp.token_contribution(**{**arguments, "valid": None}, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_one_sink_dominates(draw, backend):
    """A token with nearly all of the weight is found by both outputs."""
    arguments = inputs(draw, length=80)
    arguments["valid"][:] = arguments["candidates"][:] = True
    arguments["key"][:, :, 5] = 3 * arguments["query"].view(2, 2, 2, 64).sum(2)
    check(arguments, backend)
    cosine, norm = vtp.token_contribution(**arguments, backend=backend)
    assert cosine[:, 5].tolist() == cosine.amin(1).tolist()
    assert norm[:, 5].tolist() == norm.amax(1).tolist()


def test_off_the_candidates(draw, backend):
    arguments = inputs(draw)
    cosine, norm = vtp.token_contribution(**arguments, backend=backend)
    off = ~arguments["candidates"]
    assert bool((cosine[off] == 1.0).all()) and bool((norm[off] == 0.0).all())


def test_degenerate_rows(draw, backend):
    arguments = inputs(draw, batch=4, length=20)
    arguments["candidates"][:] = True
    arguments["valid"][0] = False  # all padding: no output
    arguments["valid"][1] = False
    arguments["valid"][1, 3] = True  # one token is all of the output
    arguments["value"][2] = 0.0  # no output either
    arguments["value"][3, :, :] = 0.0
    arguments["value"][3, :, 7] = 1.0  # one token is all of the output, others have weight
    arguments["valid"][3, 7] = True
    cosine, norm = vtp.token_contribution(**arguments, backend=backend)
    ones = torch.ones(20, device=draw.device)
    assert torch.equal(cosine[0], ones) and torch.equal(norm[0], 0 * ones)
    assert torch.equal(cosine[1], torch.where(arguments["valid"][1], 0.0, ones))
    whole = arguments["value"][1, :, 3].double().square().sum() * 2  # each KV head serves two
    torch.testing.assert_close(norm[1, 3].double(), whole.sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(cosine[2], ones) and torch.equal(norm[2], 0 * ones)
    others = torch.arange(20, device=draw.device) != 7
    assert bool((cosine[3][others] == 1.0).all()) and bool((norm[3][others] == 0.0).all())
    assert cosine[3, 7].item() == 0.0


def test_padding_may_hold_anything(draw, backend):
    arguments = inputs(draw)
    clean = vtp.token_contribution(**arguments, backend=backend)
    padded = ~arguments["valid"][:, None, :, None]
    for junk in (math.nan, math.inf):
        for name in ("key", "value"):
            arguments[name] = arguments[name].masked_fill(padded, junk)
        got = vtp.token_contribution(**arguments, backend=backend)
        assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


def test_strides(draw, backend):
    arguments = inputs(draw, length=33)
    views = dict(arguments)
    views["query"] = draw.normal(2, 4, 128)
    views["query"][..., ::2] = arguments["query"]
    views["query"] = views["query"][..., ::2]
    cache = draw.normal(2, 2, 40, 65)
    cache[:, :, 5:38, 1:] = arguments["key"]
    views["key"] = cache[:, :, 5:38, 1:]
    views["value"] = arguments["value"].transpose(1, 2).contiguous().transpose(1, 2)
    views["candidates"] = arguments["candidates"].t().contiguous().t()
    check(views, backend)


def test_empty(draw, backend):
    for batch, length in ((0, 9), (2, 0)):
        cosine, norm = vtp.token_contribution(
            **inputs(draw, batch=batch, length=length), backend=backend
        )
        assert cosine.shape == norm.shape == (batch, length)


def test_repeats_bit_for_bit(draw, backend):
    arguments = inputs(draw, length=2880)
    first = vtp.token_contribution(**arguments, backend=backend)
    second = vtp.token_contribution(**arguments, backend=backend)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(2, 4, 1, 8)}, ValueError, r"query must have shape \[B, Hq, D\]"),
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "multiple of key's 2 heads .* got 3"),
        ({"query": torch.zeros(2, 4, 8).long()}, TypeError, "query must be float16 .* int64"),
        ({"key": torch.zeros(2, 2, 5, 4)}, ValueError, "key must have shape"),
        ({"key": torch.zeros(2, 2, 5, 8).half()}, TypeError, "key must have the dtype of query"),
        ({"value": torch.zeros(2, 2, 6, 8)}, ValueError, "value must have shape"),
        ({"value": torch.zeros(2, 2, 5, 8).double()}, TypeError, "value must have the dtype"),
        ({"value": torch.zeros(2, 2, 5, 8, device="meta")}, ValueError, "value must be on cpu"),
        ({"candidates": torch.ones(2, 4).bool()}, ValueError, "candidates must have shape"),
        ({"valid": torch.ones(2, 5)}, TypeError, "valid must be bool"),
        ({"scale": None, "backend": "fast"}, ValueError, "backend must be one of"),
        (
            {
                "query": torch.zeros(2, 4, 300),
                "key": torch.zeros(2, 2, 5, 300),
                "value": torch.zeros(2, 2, 5, 300),
            },
            NotImplementedError,
            "head dim of at most 256, got 300",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "query": torch.zeros(2, 4, 8),
        "key": torch.zeros(2, 2, 5, 8),
        "value": torch.zeros(2, 2, 5, 8),
        "candidates": torch.ones(2, 5, dtype=torch.bool),
        **change,
    }
    with pytest.raises(error, match=message):
        vtp.token_contribution(**arguments)
