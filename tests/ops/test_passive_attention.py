"""passive_attention against float64, and the reference against an edited softmax, row by row."""

import itertools
import math

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import reference

OP = "passive_attention"
SINKS = ("merge", "drop")
VISUAL_ROWS = ("prefix", "causal", "skip")
OPTIONS = list(itertools.product(SINKS, VISUAL_ROWS, (False, True)))
# Half outputs are rounded once more on the way out: half a unit in the last place, 2^-9 for
# bfloat16 and 2^-12 for float16 relative, on top of float32 arithmetic.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def inputs(draw, batch=2, heads=4, kv_heads=2, length=40, dim=64, dtype=torch.float32):
    """Prefix, image, text, second image, text; the second sequence is left-padded."""
    visual = torch.zeros(batch, length, dtype=torch.bool, device=draw.device)
    visual[:, length // 8 : length // 2] = True
    visual[:, length - length // 4 : length - length // 8] = True
    valid = torch.ones_like(visual)
    valid[1:, : length // 6] = False
    return {
        "query": draw.normal(batch, heads, length, dim, dtype=dtype),
        "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "value": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
        "visual": visual,
        "valid": valid,
    }


def check(arguments, backend, **options):
    """Float32: 1e-5 of the largest value, the size of what is averaged."""
    got = vtp.passive_attention(**arguments, **options, backend=backend)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    want = reference.passive_attention(**wide, **options)
    dtype = arguments["query"].dtype
    assert got.dtype == dtype and got.shape == want.shape
    if dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    else:
        atol = 1e-5 * arguments["value"].abs().amax().item() if want.numel() else 0.0
        torch.testing.assert_close(got.double(), want, rtol=ROUNDING[dtype], atol=atol)
    return got


def loops(query, key, value, visual, valid, sink, visual_rows, renormalize, scale):
    """The weights of every row as a list of numbers, edited as the public code edits them."""
    batch, heads, length, _ = query.shape
    out = torch.zeros_like(query)
    for b, h, t in itertools.product(range(batch), range(heads), range(length)):
        if not valid[b, t] or (visual[b, t] and visual_rows == "skip"):
            continue
        g = h * key.shape[1] // heads
        seen = [s for s in range(t + 1) if valid[b, s]]
        e = {s: math.exp(scale * float(query[b, h, t] @ key[b, g, s])) for s in seen}
        images = [s for s in seen if visual[b, s]]
        if visual[b, t]:
            removed = images if visual_rows == "prefix" else []
        else:
            removed = images[1:] if renormalize and sink == "merge" else images
        total = sum(e[s] for s in seen if not renormalize or s not in removed)
        weights = {s: e[s] / total for s in seen if s not in removed}
        if not visual[b, t] and sink == "merge" and not renormalize and images:
            weights[images[0]] = sum(e[s] for s in images) / total
        for s, weight in weights.items():
            out[b, h, t] += weight * value[b, g, s]
    return out


@pytest.mark.parametrize("sink, visual_rows, renormalize", OPTIONS)
def test_reference_equals_loops(draw, sink, visual_rows, renormalize):
    arguments = inputs(draw, length=24, dim=4, dtype=torch.float64)
    arguments["visual"][1] = draw.bools(24)
    arguments["valid"][1] = draw.bools(24, p=0.8)
    options = {"sink": sink, "visual_rows": visual_rows, "renormalize": renormalize, "scale": 0.4}
    got = reference.passive_attention(**arguments, **options)
    torch.testing.assert_close(got, loops(**arguments, **options), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sink, visual_rows, renormalize", OPTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_options(draw, backend, sink, visual_rows, renormalize, dtype):
    options = {"sink": sink, "visual_rows": visual_rows, "renormalize": renormalize}
    check(inputs(draw, dtype=dtype), backend, **options)
    scattered = inputs(draw, length=33, dtype=dtype)
    scattered["visual"] = draw.bools(2, 33)
    scattered["valid"] = draw.bools(2, 33, p=0.7)
    check(scattered, backend, **options, scale=0.05)


@pytest.mark.parametrize("length", (0, 1, 2, 31, 128, 129, 577))
def test_lengths(draw, backend, length):
    arguments = inputs(draw, length=length)
    check(arguments, backend)
    check(arguments, backend, sink="drop", visual_rows="causal")


@pytest.mark.parametrize("kv_heads, group", ((1, 1), (3, 1), (2, 4), (1, 8)))
@pytest.mark.parametrize("dim", (1, 7, 64, 80, 96, 128, 256))
def test_heads_and_dims(draw, backend, kv_heads, group, dim):
    check(inputs(draw, heads=kv_heads * group, kv_heads=kv_heads, dim=dim), backend)


def test_without_images_is_causal_attention(draw, backend):
    arguments = inputs(draw, batch=1)
    arguments["visual"][:] = False
    key, value = (arguments[x].repeat_interleave(2, 1) for x in ("key", "value"))
    want = torch.nn.functional.scaled_dot_product_attention(
        arguments["query"].double(), key.double(), value.double(), is_causal=True
    )
    for sink, visual_rows, renormalize in OPTIONS:
        options = {"sink": sink, "visual_rows": visual_rows, "renormalize": renormalize}
        got = check(arguments, backend, **options)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_all_visual(draw, backend):
    arguments = inputs(draw)
    arguments["visual"][:] = True
    got = check(arguments, backend)
    assert torch.equal(got, torch.zeros_like(got))
    check(arguments, backend, visual_rows="causal")


def test_padding_rows_are_zero_and_padding_may_hold_anything(draw, backend):
    arguments = inputs(draw)
    arguments["valid"][0, ::3] = False
    clean = check(arguments, backend)
    padded = ~arguments["valid"][:, None, :, None]
    assert bool((clean.masked_select(padded) == 0).all())
    for junk in (math.nan, math.inf):
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].masked_fill(padded, junk)
        assert torch.equal(vtp.passive_attention(**arguments, backend=backend), clean)


def test_all_padding(draw, backend):
    arguments = inputs(draw)
    arguments["valid"][:] = False
    got = check(arguments, backend)
    assert torch.equal(got, torch.zeros_like(got))


def test_image_first(draw, backend):
    """No prefix: visual rows that read the prefix alone read nothing."""
    arguments = inputs(draw, batch=1)
    arguments["visual"][:, :20] = True
    for renormalize in (False, True):
        got = check(arguments, backend, renormalize=renormalize)
        assert torch.equal(got[:, :, :20], torch.zeros_like(got[:, :, :20]))


def test_without_valid(draw, backend):
    arguments = inputs(draw, batch=1)
    want = vtp.passive_attention(**arguments, backend=backend)
    arguments["valid"] = None
    assert torch.equal(vtp.passive_attention(**arguments, backend=backend), want)


def test_strides(draw, backend):
    arguments = inputs(draw)
    arguments["query"] = draw.normal(2, 40, 4, 64).transpose(1, 2)
    arguments["key"] = draw.normal(2, 2, 50, 65)[:, :, 3:43, 1:]
    arguments["value"] = draw.normal(2, 2, 40, 128)[..., ::2]
    arguments["visual"] = arguments["visual"].t().contiguous().t()
    check(arguments, backend)


def test_large_logits_do_not_overflow(draw, backend):
    arguments = inputs(draw)
    arguments["query"] = arguments["query"] * 1e3
    got = vtp.passive_attention(**arguments, backend=backend)
    assert bool(got.isfinite().all())


def test_empty_batch(draw, backend):
    check(inputs(draw, batch=0), backend)


def test_repeats_bit_for_bit(draw, backend):
    arguments = inputs(draw, length=300)
    first = vtp.passive_attention(**arguments, backend=backend)
    assert torch.equal(first, vtp.passive_attention(**arguments, backend=backend))


X = torch.zeros(2, 4, 6, 8)
KV = torch.zeros(2, 2, 6, 8)
MASK = torch.zeros(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": X[0]}, ValueError, r"query must have shape \[B, Hq, S, D\]"),
        ({"query": X[:, :3]}, ValueError, "multiple of key's 2 heads .* got 3"),
        ({"query": X[:, :, :1]}, ValueError, r"key must have shape .* got \[2, 2, 6, 8\]"),
        ({"query": X.bool()}, TypeError, "query must be float16 .* got bool"),
        ({"key": KV.half()}, TypeError, "key must have the dtype of query"),
        ({"value": KV[..., :4]}, ValueError, "value must have shape"),
        ({"value": KV.double()}, TypeError, "value must have the dtype of query"),
        ({"visual": MASK[:, :5]}, ValueError, "visual must have shape"),
        ({"visual": MASK.long()}, TypeError, "visual must be bool"),
        ({"valid": MASK.to("meta")}, ValueError, "valid must be on cpu, got meta"),
        ({"sink": "keep"}, ValueError, "sink must be one of .* got 'keep'"),
        ({"visual_rows": "none"}, ValueError, "visual_rows must be one of .* got 'none'"),
        (
            {
                "query": torch.zeros(1, 1, 6, 257),
                "key": torch.zeros(1, 1, 6, 257),
                "value": torch.zeros(1, 1, 6, 257),
                "visual": MASK[:1],
            },
            NotImplementedError,
            "head dim of at most 256",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"query": X, "key": KV, "value": KV, "visual": MASK, **change}
    with pytest.raises(error, match=message):
        vtp.passive_attention(**arguments)
