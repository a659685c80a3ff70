"""Results depend on the inputs alone: not on the run, the batch, the memory's layout or history."""

import pytest
import torch
from variants import (
    OPS,
    VARIANTS,
    assert_same_bits,
    bits,
    cloned,
    each,
    flat,
    hard_rows,
    row,
)

import vtp_kernels as vtp

LENGTH = 1500
REHEARSED = ("test_",)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_twenty_runs(draw, variant):
    arguments = variant.draw(draw, LENGTH)
    want = variant.run(arguments)
    for _ in range(20):
        assert_same_bits(variant.run(arguments), want)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_batch_gives_what_its_rows_give_alone(draw, variant):
    batch = 5
    arguments = variant.draw(draw, LENGTH, batch)
    together = variant.run(arguments)
    for b in range(batch):
        assert_same_bits(variant.run(row(arguments, b)), [x[b : b + 1] for x in together])


# --- layouts ------------------------------------------------------------------------------------


def off_by_one(x):
    """The same numbers, one element past an aligned address."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = memory[1:].view(x.shape)
    return view.copy_(x)


def longer_rows(x):
    """A slice of the last dimension of something longer, so that rows lie at odd distances."""
    memory = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    return memory[..., 1:-2].copy_(x)


def within_a_longer_cache(x):
    """A slice of dimension 2 of a static cache [B, H, longer, D]."""
    if x.dim() != 4:
        return longer_rows(x)
    batch, heads, length, dim = x.shape
    memory = torch.empty(batch, heads, length + 40, dim, dtype=x.dtype, device=x.device)
    return memory[:, :, 7 : 7 + length].copy_(x)


def sequence_before_heads(x):
    """[B, H, S, D] over memory in the order [B, S, H, D], as a projection leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else off_by_one(x)


def batch_innermost(x):
    """Stride 1 in the batch dimension alone, which no kernel reads directly."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() > 1 else x


LAYOUTS = (off_by_one, longer_rows, within_a_longer_cache, sequence_before_heads, batch_innermost)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_layouts(draw, variant, layout):
    """Views give what contiguous copies give."""
    if variant.in_place and layout is batch_innermost:
        pytest.skip("in place, the last dimension must have stride 1")
    arguments = variant.draw(draw, 577)
    want = variant.run(arguments)
    assert_same_bits(variant.call(each(layout, arguments)), want)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_row_for_the_whole_batch(draw, variant):
    """Expanded tensors: stride 0 in the batch."""
    if variant.in_place:
        pytest.skip("in place, no two elements may share memory")
    arguments = row(variant.draw(draw, 577), 1)
    alone = variant.run(arguments)

    def expand(x):
        return x.expand(4, *x.shape[1:])

    if arguments.get("indices") is not None and arguments["indices"].dim() > 2:
        arguments = {
            name: each(expand, x) if name in ("keys", "values") else x.repeat_interleave(4, 1)
            for name, x in arguments.items()
        }
    else:
        arguments = each(expand, arguments)
    assert_same_bits(variant.run(arguments), [x.repeat_interleave(4, 0) for x in alone])


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture
def fill_new_tensors():
    """torch then fills what it would leave uninitialised: NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def leave_behind(byte: int) -> None:
    """Fills the memory that the allocator will hand out next, in blocks small and large."""
    torch.cuda.empty_cache()
    sizes = [2**20] * 64 + [2**28]
    blocks = [torch.full((size,), byte, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_element_is_written(draw, variant):
    """Outputs and workspace hold anything at first; what is not written would show."""
    arguments = variant.draw(draw, 577)
    want = variant.run(arguments)
    variant.check(arguments, want)
    for byte in (0x00, 0xFF, 0x7F):
        copies = [cloned(arguments) for _ in range(2)]
        leave_behind(byte)
        for own in copies:  # the second call finds what the first has left
            assert_same_bits(variant.call(own), want)


@pytest.mark.usefixtures("fill_new_tensors")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_reads_the_filling(draw, variant):
    arguments = variant.draw(draw, 577)
    variant.check(arguments, variant.run(arguments))


# --- compaction in place, at the size where blocks race if they can -----------------------------


def tail(length, width, draw):
    """All but the first row: every row moves by one, onto a row that is still to be read."""
    return torch.arange(length - width, length)


def every_other(length, width, draw):
    return torch.arange(0, length, 2)[:width]


def random(length, width, draw):
    return torch.randperm(length, generator=draw.generator)[:width].sort().values


def first(length, width, draw):
    """Nothing moves."""
    return torch.arange(width)


@pytest.mark.parametrize("dim", (128, 80, 7))
@pytest.mark.parametrize("pattern", (tail, every_other, random, first), ids=lambda f: f.__name__)
def test_in_place_is_out_of_place(draw, pattern, dim):
    layers, batch, heads, length = 12, 2, 8, 1000
    width = 999 if pattern is tail else 500
    indices = torch.stack([pattern(length, width, draw) for _ in range(batch)]).cuda()
    counts = torch.tensor([width, width // 3], dtype=torch.int32, device="cuda")
    shape = (2 * layers, batch, heads, length, dim)
    memory = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda")
    memory = memory.view(torch.bfloat16)
    before = memory.clone()
    keys, values = memory[:layers].unbind(), memory[layers:].unbind()
    options = {"indices": indices, "counts": counts, "backend": "native"}
    new = flat(vtp.compact_kv(keys, values, **options))
    assert_same_bits([memory], [before])  # out of place, the cache stays as it is
    for _ in range(5):
        memory.copy_(before)
        vtp.compact_kv(keys, values, **options, in_place=True)
        for x, rows, old in zip(memory, new, before, strict=True):
            for b, count in enumerate(counts.tolist()):
                assert torch.equal(bits(x[b, :, :count]), bits(rows[b, :, :count]))
                assert torch.equal(bits(x[b, :, count:]), bits(old[b, :, count:]))


# --- the CPU library ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", (1, 33, 576, 577, 2880, 10000))
def test_selects_what_the_cpu_selects(draw, length):
    """The same scores, the same bits: two implementations, one contract."""
    scores = hard_rows(draw, 14, length)
    candidates, keep = draw.bools(14, length, p=0.7), draw.bools(14, length, p=0.1)
    for k in {0, 1, length // 9, length - 1, length + 3}:
        for options in (
            {},
            {"candidates": candidates},
            {"candidates": candidates, "keep": keep, "threshold": 0.1, "capacity": length // 2},
        ):
            got = vtp.select_topk(scores, k, **options, backend="native")
            want = vtp.select_topk(scores.cpu(), k, **each(torch.Tensor.cpu, options))
            assert_same_bits([x.cpu() for x in got], list(want))


@pytest.mark.parametrize("rule", ("chord", "kneedle", "iqr", "mass"))
@pytest.mark.parametrize("length", (1, 33, 576, 2880, 10000))
def test_finds_the_knee_that_the_cpu_finds(draw, rule, length):
    curves = torch.cat([hard_rows(draw, 7, length), draw.normal(14, length).exp()])
    for clip_quantile in (0.995, 1.0):
        options = {"rule": rule, "clip_quantile": clip_quantile, "min_keep": 0}
        got = vtp.inflection(curves, **options, backend="native")
        want = vtp.inflection(curves.cpu(), **options)
        assert_same_bits([x.cpu() for x in got], list(want))


def test_every_op_has_a_variant():
    assert set(OPS) == set(vtp.reference.__all__)
