"""attention_scores against float64, and the reference against loops over plain numbers."""

import itertools
import math

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import reference

OP = "attention_scores"
LENGTHS = (0, 1, 31, 576, 577, 2880, 10000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(draw, batch=2, heads=4, kv_heads=2, rows=3, length=50, dim=64, dtype=torch.float32):
    """Arguments with every mask in use. About one row in five attends to nothing."""
    valid = draw.bools(batch, length, p=0.9)
    valid[:1] = valid[:1] & (length > 1)
    return {
        "query": draw.normal(batch, heads, rows, dim, dtype=dtype),
        "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "candidates": draw.bools(batch, length, p=0.6),
        "valid": valid,
        "query_positions": draw.integers(-length // 4 - 1, length + 1, batch, rows),
        "query_valid": draw.bools(batch, rows, p=0.8),
    }


def in_float64(arguments):
    wide = {"query", "key", "value", "lse", "features", "cls"}
    return {
        name: x.double() if name in wide and x is not None else x for name, x in arguments.items()
    }


def log_sum_exp(arguments, scale=None):
    """The lse a FlashAttention forward would return, float64 [B, Hq, M]."""
    query, key = arguments["query"].double(), arguments["key"].double()
    heads, dim = query.shape[1], query.shape[3]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    logits = query @ key.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    attended = torch.ones_like(logits, dtype=torch.bool)
    if arguments.get("valid") is not None:
        attended &= arguments["valid"][:, None, None, :]
    if arguments.get("query_positions") is not None:
        positions = torch.arange(key.shape[2], device=key.device)
        attended &= positions <= arguments["query_positions"][:, None, :, None]
    return logits.masked_fill(~attended, -math.inf).logsumexp(-1)


def assert_close(got, want, dtype=torch.float32):
    """1e-5 relative: float32 sums over D <= 256 and exp of logits below about 10.

    Half inputs are exact in float32, so they get no wider bound. The absolute part covers scores
    that underflow in float32 (exp(-104) is its smallest number).
    """
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-30)


def loops(query, key, candidates, valid, query_positions, query_valid, scale, support, head_reduce):
    """The definition in plain numbers."""
    batch, heads, rows, _ = query.shape
    kv_heads, length = key.shape[1:3]
    scores = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        per_head = [[0.0] * length for _ in range(heads)]
        count = max(int(query_valid[b].sum()), 1)
        for h, m in itertools.product(range(heads), range(rows)):
            if not query_valid[b, m]:
                continue
            attended = [
                s
                for s in range(length)
                if valid[b, s]
                and s <= query_positions[b, m]
                and (support == "all" or candidates[b, s])
            ]
            g = h * kv_heads // heads
            weights = [
                math.exp(scale * sum((query[b, h, m] * key[b, g, s]).tolist())) for s in attended
            ]
            for s, weight in zip(attended, weights, strict=True):
                per_head[h][s] += weight / sum(weights) / count
        for s in range(length):
            column = [per_head[h][s] for h in range(heads)]
            reduced = {"mean": sum(column) / heads, "max": max(column), "sum": sum(column)}
            scores[b, s] = reduced[head_reduce] if candidates[b, s] else 0.0
    return scores


@pytest.mark.parametrize("support", ("all", "candidates"))
@pytest.mark.parametrize("head_reduce", ("mean", "max", "sum"))
def test_reference_equals_loops(draw, support, head_reduce):
    arguments = inputs(draw, heads=6, length=11, dim=8, dtype=torch.float64)
    options = {"scale": 0.3, "support": support, "head_reduce": head_reduce}
    got = reference.attention_scores(**arguments, **options)
    torch.testing.assert_close(got, loops(**arguments, **options), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(draw, backend, length, dtype):
    arguments = inputs(draw, length=length, dtype=dtype)
    got = vtp.attention_scores(**arguments, backend=backend)
    assert_close(got, reference.attention_scores(**in_float64(arguments)), dtype)


@pytest.mark.parametrize("kv_heads, group", ((1, 1), (3, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("dim", (1, 7, 64, 80, 96, 128, 256))
def test_heads_and_dims(draw, backend, kv_heads, group, dim):
    arguments = inputs(draw, heads=kv_heads * group, kv_heads=kv_heads, length=67, dim=dim)
    got = vtp.attention_scores(**arguments, backend=backend)
    assert_close(got, reference.attention_scores(**in_float64(arguments)))


@pytest.mark.parametrize("support", ("all", "candidates"))
@pytest.mark.parametrize("head_reduce", ("mean", "max", "sum"))
@pytest.mark.parametrize("rows", (0, 1, 5, 33))
def test_options(draw, backend, support, head_reduce, rows):
    arguments = inputs(draw, rows=rows, length=90)
    scale = 0.4 * draw.uniform(1).item() - 0.2
    options = {"support": support, "head_reduce": head_reduce, "scale": scale}
    for left_out in (None, "valid", "query_positions", "query_valid"):
        some = {name: x for name, x in arguments.items() if name != left_out}
        got = vtp.attention_scores(**some, **options, backend=backend)
        assert_close(got, reference.attention_scores(**in_float64(some), **options))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dim, rows", ((64, 32), (80, 84), (128, 33)))
def test_rows_of_many_heads(draw, backend, dtype, dim, rows):
    """More than 64 rows on a KV head, of several heads."""
    arguments = inputs(draw, heads=6, kv_heads=2, rows=rows, length=140, dim=dim, dtype=dtype)
    for head_reduce in ("mean", "max"):
        got = vtp.attention_scores(**arguments, head_reduce=head_reduce, backend=backend)
        want = reference.attention_scores(**in_float64(arguments), head_reduce=head_reduce)
        assert_close(got, want)


def test_last_token_of_a_prompt(draw, backend):
    arguments = inputs(draw, heads=8, kv_heads=8, rows=1, length=640, dim=128)
    some = {name: arguments[name] for name in ("query", "key", "candidates")}
    got = vtp.attention_scores(**some, backend=backend)
    assert_close(got, reference.attention_scores(**in_float64(some)))


@pytest.mark.parametrize("head_reduce", ("mean", "max", "sum"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_lse(draw, backend, head_reduce, dtype):
    arguments = inputs(draw, rows=4, length=130, dtype=dtype)
    lse = log_sum_exp(arguments)
    want = reference.attention_scores(**in_float64(arguments), head_reduce=head_reduce)
    lse = lse if dtype == torch.float64 else lse.float()
    got = vtp.attention_scores(**arguments, lse=lse, head_reduce=head_reduce, backend=backend)
    assert_close(got, want, dtype)


def test_lse_of_an_empty_row_weighs_nothing(draw, backend):
    arguments = inputs(draw, rows=2, length=20)
    some = {name: arguments[name] for name in ("query", "key", "candidates")}
    lse = torch.full((2, 4, 2), -math.inf, device=draw.device)
    got = vtp.attention_scores(**some, lse=lse, backend=backend)
    assert torch.equal(got, torch.zeros_like(got))


def test_nothing_to_attend_is_zero(draw, backend):
    arguments = inputs(draw, batch=4, length=40)
    arguments["valid"][0] = False  # all padding
    arguments["query_positions"][1] = -1  # before the first key
    arguments["query_valid"][2] = False  # no row counts
    arguments["candidates"][3] = False
    for support in ("all", "candidates"):
        got = vtp.attention_scores(**arguments, support=support, backend=backend)
        assert torch.equal(got, torch.zeros_like(got))


def test_padding_may_hold_anything(draw, backend):
    arguments = inputs(draw, length=60)
    clean = vtp.attention_scores(**arguments, backend=backend)
    padded = ~arguments["valid"][:, None, :, None]
    unused = ~arguments["query_valid"][:, None, :, None]
    for junk in (math.nan, math.inf, -math.inf):
        arguments["key"] = arguments["key"].masked_fill(padded, junk)
        arguments["query"] = arguments["query"].masked_fill(unused, junk)
        assert torch.equal(vtp.attention_scores(**arguments, backend=backend), clean)


def test_large_logits_do_not_overflow(draw, backend):
    arguments = inputs(draw, length=60)
    arguments["query"] = arguments["query"] * 1e3
    got = vtp.attention_scores(**arguments, backend=backend)
    assert bool(got.isfinite().all())
    # Logits near 1e4 are known to 1e-3 in float32, so weights to about that, relative.
    want = reference.attention_scores(**in_float64(arguments))
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-30)


def test_equal_logits_share_evenly(backend, device):
    query, key = torch.zeros(1, 2, 1, 8, device=device), torch.zeros(1, 1, 4, 8, device=device)
    candidates = torch.tensor([[True, True, False, True]], device=device)
    got = vtp.attention_scores(query, key, candidates=candidates, backend=backend)
    assert got.tolist() == [[0.25, 0.25, 0.0, 0.25]]


def test_non_finite_keys_spread_to_their_heads_only(draw, backend):
    """A NaN or infinite logit makes its own batch row NaN, and no other."""
    arguments = inputs(draw, batch=2, rows=1, length=30)
    some = {name: arguments[name] for name in ("query", "key")}
    some["candidates"] = torch.ones(2, 30, dtype=torch.bool, device=draw.device)
    clean = vtp.attention_scores(**some, backend=backend)
    some["key"][0, :, 11] = math.nan
    got = vtp.attention_scores(**some, backend=backend)
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1], clean[1])


def test_strides(draw, backend):
    arguments = inputs(draw, length=33, dim=64)
    want = reference.attention_scores(**in_float64(arguments))
    views = dict(arguments)
    # [B, S, H, D] memory, as projections leave it; a slice of a longer cache; last stride 2.
    views["query"] = arguments["query"].transpose(1, 2).contiguous().transpose(1, 2)
    cache = draw.normal(2, 2, 40, 65)
    cache[:, :, 5:38, 1:] = arguments["key"]  # misaligned as well
    views["key"] = cache[:, :, 5:38, 1:]
    wide = torch.zeros(2, 66, dtype=torch.bool, device=draw.device)
    wide[:, ::2] = arguments["candidates"]
    views["candidates"] = wide[:, ::2]
    views["valid"] = arguments["valid"].t().contiguous().t()
    assert_close(vtp.attention_scores(**views, backend=backend), want)
    spread = draw.normal(2, 4, 3, 128)
    spread[..., ::2] = arguments["query"]
    views["query"] = spread[..., ::2]
    assert_close(vtp.attention_scores(**views, backend=backend), want)


def test_shared_keys(draw, backend):
    arguments = inputs(draw, length=33)
    arguments["key"] = arguments["key"][:1].expand(2, -1, -1, -1)
    want = reference.attention_scores(**in_float64(arguments))
    assert_close(vtp.attention_scores(**arguments, backend=backend), want)


def test_empty_batch(draw, backend):
    got = vtp.attention_scores(**inputs(draw, batch=0), backend=backend)
    assert got.shape == (0, 50) and got.dtype == torch.float32


def test_repeats_bit_for_bit(draw, backend):
    arguments = inputs(draw, rows=9, length=2880)
    first = vtp.attention_scores(**arguments, backend=backend)
    assert torch.equal(first, vtp.attention_scores(**arguments, backend=backend))


ONES = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("op", ("attention_scores", "attention_topk"))
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(2, 4, 8)}, ValueError, r"query must have shape \[B, Hq, M, D\]"),
        ({"query": torch.zeros(2, 3, 1, 8)}, ValueError, "multiple of key's 2 heads .* got 3"),
        ({"query": torch.zeros(2, 4, 1, 8).int()}, TypeError, "query must be float16 .* int32"),
        ({"key": torch.zeros(2, 2, 5, 9)}, ValueError, "key must have shape"),
        ({"key": torch.zeros(1, 2, 5, 8)}, ValueError, "key must have shape"),
        ({"key": torch.zeros(2, 2, 5, 8).half()}, TypeError, "key must have the dtype of query"),
        ({"key": torch.zeros(2, 2, 5, 8, device="meta")}, ValueError, "key must be on cpu"),
        ({"candidates": ONES[:, :4]}, ValueError, r"candidates must have .* got \[2, 4\]"),
        ({"candidates": ONES.long()}, TypeError, "candidates must be bool"),
        ({"candidates": None}, TypeError, "candidates must be a tensor"),
        ({"valid": ONES[:1]}, ValueError, "valid must have shape"),
        ({"query_positions": torch.zeros(2, 2).long()}, ValueError, "query_positions must have"),
        ({"query_positions": torch.zeros(2, 1).int()}, TypeError, "query_positions must be int64"),
        ({"query_valid": torch.ones(2, 1)}, TypeError, "query_valid must be bool"),
        ({"lse": torch.zeros(2, 4)}, ValueError, r"lse must have shape \[B, Hq, M\]"),
        ({"lse": torch.zeros(2, 4, 1).half()}, TypeError, "lse must be float32"),
        (
            {"lse": torch.zeros(2, 4, 1), "support": "candidates"},
            ValueError,
            "lse must be None with support='candidates'",
        ),
        ({"support": "some"}, ValueError, "support must be one of .* got 'some'"),
        ({"head_reduce": "min"}, ValueError, "head_reduce must be one of .* got 'min'"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        (
            {"query": torch.zeros(2, 4, 1, 257), "key": torch.zeros(2, 2, 5, 257)},
            NotImplementedError,
            "head dim of at most 256, got 257",
        ),
        (
            {"query": torch.zeros(2, 4, 1, 0), "key": torch.zeros(2, 2, 5, 0)},
            ValueError,
            "head dim of at least 1",
        ),
        ({"key": torch.zeros(2, 0, 5, 8)}, ValueError, "multiple of key's 0 heads"),
    ],
)
def test_bad_input(op, change, error, message):
    arguments = {
        "query": torch.zeros(2, 4, 1, 8),
        "key": torch.zeros(2, 2, 5, 8),
        "candidates": ONES,
        **({"k": 2} if op == "attention_topk" else {}),
        **change,
    }
    with pytest.raises(error, match=message):
        getattr(vtp, op)(**arguments)
