"""Products of a warpgroup, as descriptors name their operands, and the passes that use them."""

import numpy as np
import pytest
import torch

from emulator import build
from vtp_kernels import reference

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BY_WARPGROUP = "attention_scores by warpgroup"
ROWS, COLUMNS, DEPTH = 64, 128, 128  # of the planted product


def bits_of(x):
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture
def product(kernels, draw):
    """A function that multiplies [64, 128] and [128, 128] of small integers, whose sums are exact,
    with a planted mistake or without; it tells whether the product is right."""

    def run(mistake, dtype="bfloat16"):
        a, b = (draw.integers(-8, 9, rows, DEPTH).to(DTYPES[dtype]) for rows in (ROWS, COLUMNS))
        multiply = getattr(kernels.primitives, f"product_{dtype}")
        got = torch.from_numpy(multiply(bits_of(a), bits_of(b), mistake))
        return torch.equal(got.double(), a.double() @ b.double().T)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_product(kernels, product, draw, order, dtype):
    assert product("none", dtype)
    a, b = (draw.normal(rows, DEPTH).to(DTYPES[dtype]) for rows in (ROWS, COLUMNS))
    got = getattr(kernels.primitives, f"product_{dtype}")(bits_of(a), bits_of(b), "none")
    wrong = torch.from_numpy(got).double() - a.double() @ b.double().T
    # No order of the sums is promised: each of DEPTH float32 steps rounds at most the sum of sizes.
    most = DEPTH * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs().T)
    assert (wrong.abs() <= most).all()


@pytest.mark.parametrize(
    "mistake",
    (
        *("unswizzled", "no_swizzle", "swizzle_64", "swizzle_32", "short_stride", "misaligned"),
        *("next_columns", "swapped", "no_commit", "no_wait"),
    ),
)
def test_a_wrong_layout_or_a_missing_wait_makes_a_wrong_product(product, order, mistake):
    assert not product(mistake)


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("long_stride", "row 72 of operand B is no shared memory of the block"),
        ("not_there", "row 0 of operand A is no shared memory of the block"),
        ("base_offset", "a descriptor with a base offset, which is not modelled"),
        ("reserved_bits", "a descriptor with bits set between its fields"),
        ("no_fence", "row 0 of operand A was not fenced, by all threads, before a barrier"),
        ("some_fence", "row 0 of operand A was not fenced, by all threads, before a barrier"),
        ("no_barrier", "row 0 of operand A was not fenced, by all threads, before a barrier"),
        ("barrier_before_fence", "was not fenced, by all threads, before a barrier"),
        ("no_begin", "wgmma without begin_products since the sums were last the kernel's"),
        ("late_sums", "sums are written while a product runs"),
        ("overwritten", "row 5 of operand A is changed while a product runs"),
        ("overwritten_by_others", "of operand B is changed while a product runs"),
        ("different_operands", "the threads of a warpgroup name different operands"),
        ("part_of_a_warpgroup", "96 of warpgroup 0 at wgmma .* 32 of 128 have returned"),
    ],
)
def test_misuse_is_an_error_that_says_what(product, order, mistake, message):
    with pytest.raises(RuntimeError, match=f"kernel product, block .*{message}"):
        product(mistake)
    assert product("none")  # the emulator is as good as before


def test_other_architectures_have_no_such_products(kernels, product):
    for number in (80, 100):
        with (
            build.architecture(kernels, number),
            pytest.raises(RuntimeError, match="no products of a warpgroup"),
        ):
            product("none")


# ---- The passes of attention_scores --------------------------------------------------------------


def inputs(draw, dtype, heads, kv_heads, rows, length, dim):
    """Arguments of attention_scores, NaN where nothing may be looked at."""
    batch = 2
    valid, query_valid = draw.bools(batch, length, p=0.9), draw.bools(batch, rows, p=0.8)
    query = draw.normal(batch, heads, rows, dim, dtype=dtype)
    key = draw.normal(batch, kv_heads, length, dim, dtype=dtype)
    return {
        "query": query.masked_fill(~query_valid[:, None, :, None], torch.nan),
        "key": key.masked_fill(~valid[:, None, :, None], torch.nan),
        "candidates": draw.bools(batch, length, p=0.6),
        "valid": valid,
        "query_positions": draw.integers(-length // 4 - 1, length + 1, batch, rows),
        "query_valid": query_valid,
    }


def scores(arguments, architecture=90, **options):
    names = ("query", "key", "candidates", "valid", "query_positions", "query_valid", "lse")
    dim = arguments["query"].shape[3]
    chosen = {"scale": dim**-0.5, "support": "all", "head_reduce": "mean", **options}
    with build.architecture(build.load("plain"), architecture):
        return torch.ops.vtp_kernels_emulated.attention_scores(
            *(arguments.get(name) for name in names), *chosen.values()
        )


@pytest.fixture
def passes(kernels):
    """A function that runs attention_scores: scores, and how many passes were by warpgroups."""

    def count(*arguments, **options):
        before = kernels.launches().get(BY_WARPGROUP, 0)
        got = scores(*arguments, **options)
        return got, kernels.launches().get(BY_WARPGROUP, 0) - before

    return count


@pytest.mark.parametrize(
    "dtype, shape, by_warpgroup",  # heads, KV heads, rows, length, dim; passes of mean, max
    [
        (torch.bfloat16, (1, 1, 64, 128, 64), (2, 2)),  # one whole tile
        (torch.bfloat16, (14, 2, 12, 140, 128), (2, 1)),  # rows of a tile from several heads
        (torch.float16, (2, 1, 84, 130, 72), (2, 2)),  # tiles not full, in every direction
        (torch.float16, (2, 1, 45, 1, 8), (2, 1)),
    ],
)
@pytest.mark.parametrize("head_reduce, support", [("mean", "all"), ("max", "candidates")])
def test_scores_equal_the_reference(
    draw, set_order, passes, dtype, shape, by_warpgroup, head_reduce, support
):
    set_order("random")
    arguments = inputs(draw, dtype, *shape)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    wide["query"], wide["key"] = (wide[name].nan_to_num() for name in ("query", "key"))
    options = {"support": support, "head_reduce": head_reduce}
    want = reference.attention_scores(**wide, **options)
    for architecture, made in ((90, by_warpgroup[head_reduce == "max"]), (80, 0)):
        got, count = passes(arguments, architecture, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30)
        assert count == made


def test_logits_that_are_not_finite(draw):
    """They spread as in the other passes."""
    arguments = inputs(draw, torch.bfloat16, 2, 1, 42, 150, 64)
    arguments["valid"] = arguments["query_positions"] = None
    for value in (torch.nan, torch.inf, -torch.inf):
        arguments["key"] = draw.normal(2, 1, 150, 64, dtype=torch.bfloat16)
        arguments["key"][0, :, 7] = value
        got, want = (scores(arguments, number) for number in (90, 80))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_a_row_alone_gives_the_bits_of_the_batch(draw):
    arguments = inputs(draw, torch.bfloat16, 4, 2, 42, 140, 64)
    together = scores(arguments)
    for b in range(2):
        alone = {name: x[b : b + 1] for name, x in arguments.items()}
        assert torch.equal(scores(alone), together[b : b + 1])


def test_who_multiplies_by_warpgroups(draw, passes):
    def made(dtype=torch.bfloat16, heads=4, rows=16, dim=64, architecture=90, **options):
        arguments = inputs(draw, dtype, heads, 1, rows, 40, dim)
        return passes(arguments, architecture, **options)[1]

    assert made() == made(torch.float16) == made(dim=128) == made(rows=21) == 2
    assert made(torch.float32) == made(dim=136) == made(scale=-0.1) == 0
    assert made(rows=15) == made(rows=17) == made(rows=20) == 0  # of four heads each
    assert made(architecture=80) == made(architecture=100) == 0
    assert made(head_reduce="max") == 1  # statistics are of all heads, columns of one
    assert made(heads=1, rows=64, head_reduce="max") == 2
    given = inputs(draw, torch.bfloat16, 4, 1, 16, 40, 64)
    given["lse"] = draw.normal(2, 4, 16)
    assert passes(given)[1] == 1
