"""What the ops allocate, and sizes that 16 and 32 bits do not hold."""

import pytest
import torch
from variants import BATCH, VARIANTS, assert_same_bits, cloned, each, flat, hard_rows

import vtp_kernels as vtp
from benchmarks.memory import peak_bytes

BFLOAT = torch.bfloat16
CUDA = torch.device("cuda")
REHEARSED = ("test_allocates", "test_keeps", "test_many_layers")  # the others are large


def allocations() -> int:
    """How many blocks torch has handed out so far."""
    return torch.cuda.memory_stats()["allocation.all.allocated"]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_allocates_outputs_and_one_workspace(draw, variant):
    arguments = variant.draw(draw, 577)
    own = cloned(arguments)
    variant.run(arguments)
    before = allocations()
    got = variant.call(own)
    made = allocations() - before
    outputs = 0 if variant.in_place else sum(x.numel() > 0 for x in got)
    assert made <= outputs + 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_keeps_nothing(draw, variant):
    """What a call leaves behind is its outputs: no cache grows."""
    arguments = variant.draw(draw, 577)
    for _ in range(2):
        variant.run(arguments)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        variant.run(arguments)
    assert torch.cuda.memory_allocated() == before


def normal(*shape, dtype=BFLOAT):
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("rows, length", ((1, 16384), (64, 16384), (100, 10000)))
@pytest.mark.parametrize("op", ("attention_scores", "attention_topk"))
def test_no_attention_matrix_of_the_scored_rows(op, rows, length):
    """M = 1 stores its logits, 4 bytes a head and key; more rows are never written out."""
    heads = 32
    query, key = normal(1, heads, rows, 128), normal(1, heads, length, 128)
    candidates = torch.ones(1, length, dtype=torch.bool, device="cuda")
    k = {"k": 100} if op == "attention_topk" else {}
    held = peak_bytes(
        CUDA, lambda: getattr(vtp, op)(query, key, **k, candidates=candidates, backend="native")
    )
    matrix = 4 * heads * rows * length
    assert held < (matrix if rows > 1 else 2 * matrix)


def test_no_attention_matrix_in_passive_attention():
    heads, length = 8, 4096
    query, key, value = (normal(1, heads, length, 128) for _ in range(3))
    visual = torch.arange(length, device="cuda")[None] < 3000
    held = peak_bytes(
        CUDA, lambda: vtp.passive_attention(query, key, value, visual=visual, backend="native")
    )
    assert held < 4 * heads * length**2 / 8


def test_no_contribution_of_every_token():
    """[B, S, Hq * D] float32 is what the definition writes out."""
    heads, length = 32, 8192
    query, key, value = normal(1, heads, 128), *(normal(1, heads, length, 128) for _ in range(2))
    candidates = torch.ones(1, length, dtype=torch.bool, device="cuda")
    held = peak_bytes(
        CUDA,
        lambda: vtp.token_contribution(query, key, value, candidates=candidates, backend="native"),
    )
    assert held < 4 * length * heads * 128 / 8


# --- many rows, many tokens ---------------------------------------------------------------------


def check_against_the_cpu(op, arguments, tolerance=1e-5, **options):
    """Float results within the tolerance, all others bit for bit those of the CPU's library."""
    call = getattr(vtp, op)
    got = flat(call(**arguments, **options, backend="native"))
    want = flat(call(**each(torch.Tensor.cpu, arguments), **options))
    for x, y in zip(got, want, strict=True):
        if x.is_floating_point():
            torch.testing.assert_close(x.cpu(), y, rtol=tolerance, atol=1e-6)
        else:
            assert_same_bits([x.cpu()], [y])


@pytest.mark.parametrize("length", (16384, 16385, 50_000, 200_000))
def test_select_topk_of_many_tokens(draw, length):
    scores = hard_rows(draw, 7, length)
    keep = draw.bools(7, length, p=0.01)
    for k in (1, 576, length // 2, length):
        check_against_the_cpu("select_topk", {"scores": scores}, k=k)
        check_against_the_cpu("select_topk", {"scores": scores, "keep": keep}, k=k, capacity=k + 9)


@pytest.mark.parametrize("rule", ("chord", "kneedle", "iqr", "mass"))
def test_inflection_of_many_tokens(draw, rule):
    curve = draw.normal(2, 50_000).exp()
    check_against_the_cpu("inflection", {"curve": curve}, rule=rule)


MANY = 70_000  # more than a grid's second and third dimension can be


@pytest.mark.parametrize("batch, heads", ((MANY, 1), (2200, 32)))
@pytest.mark.parametrize("op", ("attention_scores", "token_contribution", "passive_attention"))
def test_attention_of_many_rows(draw, op, batch, heads):
    def tensor(*shape):
        return draw.normal(*shape, dtype=BFLOAT)

    arguments = {"key": tensor(batch, heads, 5, 8)}
    if op == "attention_scores":
        arguments["query"] = tensor(batch, heads, 1, 8)
    elif op == "token_contribution":
        arguments |= {"query": tensor(batch, heads, 8), "value": tensor(batch, heads, 5, 8)}
    else:
        arguments |= {"query": tensor(batch, heads, 5, 8), "value": tensor(batch, heads, 5, 8)}
    mask = "visual" if op == "passive_attention" else "candidates"
    arguments[mask] = draw.bools(batch, 5, p=0.6)
    # Cosines cancel when one of five tokens is nearly all of the output.
    if op == "token_contribution":
        got = vtp.token_contribution(**arguments, backend="native")
        want = vtp.token_contribution(**each(torch.Tensor.cpu, arguments))
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-5, atol=1e-6)
        assert bool((got[0].cpu() - want[0]).abs().quantile(0.99) < 1e-5)
    else:
        tolerance = 2.0**-7 if op == "passive_attention" else 1e-5
        check_against_the_cpu(op, arguments, tolerance)


def test_many_rows_of_scores(draw):
    scores = draw.normal(MANY, 9)
    k = draw.integers(0, 10, MANY)
    check_against_the_cpu("select_topk", {"scores": scores, "k": k}, capacity=7)
    check_against_the_cpu("inflection", {"curve": scores.exp()})
    features, cls = draw.normal(MANY, 9, 8), draw.normal(MANY, 8)
    got = vtp.cls_inflection(features, cls, backend="native")
    want = vtp.inflection(got[1].cpu())
    assert_same_bits([x.cpu() for x in got[0]], list(want))


def test_many_query_rows(draw):
    """M = 70,000: more query rows than a grid's second dimension."""
    arguments = {
        "query": draw.normal(1, 1, MANY, 8, dtype=BFLOAT),
        "key": draw.normal(1, 1, 40, 8, dtype=BFLOAT),
        "candidates": draw.bools(1, 40, p=0.8),
    }
    check_against_the_cpu("attention_scores", arguments)


def test_many_rows_to_move(draw):
    batch, heads = 300, 256
    indices, counts = draw.rows(batch, 6, 4)
    keys = [torch.randint(-99, 99, (batch, heads, 6, 8), dtype=torch.int8, device="cuda")]
    values = [keys[0] + 1]
    for in_place in (False, True):
        arguments = cloned({"keys": keys, "values": values, "indices": indices, "counts": counts})
        check_against_the_cpu("compact_kv", arguments, in_place=in_place)
    indices, counts = draw.rows(MANY, 6, 4)
    arguments = {"tensors": [draw.normal(MANY, 6, 3)], "indices": indices, "counts": counts}
    check_against_the_cpu("compact_rows", arguments)


def test_many_layers(draw):
    """More tensors than one launch has room for in its parameters."""
    layers = 160
    indices, counts = draw.rows(2, 40, 17)
    memory = draw.normal(2 * layers, 2, 2, 40, 16, dtype=torch.float16)
    for in_place in (False, True):
        own = memory.clone()
        arguments = {
            "keys": list(own[:layers].unbind()),
            "values": list(own[layers:].unbind()),
            "indices": indices,
            "counts": counts,
        }
        check_against_the_cpu("compact_kv", arguments, tolerance=0.0, in_place=in_place)


# --- offsets past 2^31 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far_apart():
    """Gives a tensor's elements room so that its sequences lie 2^31 elements apart.

    All tensors share one buffer of bytes; a sequence of a tensor takes the next free place in it.
    """
    room = 2**31 + 2**26
    needed = 2 * room * (BATCH - 1) + 2**30
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed // 2**30 + 1} GiB of free GPU memory")
    memory = torch.zeros(room * (BATCH - 1) + 2**26, dtype=torch.int16, device="cuda")
    yield memory, room
    del memory
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v.op in ("attention_scores", "token_contribution", "compact_kv")],
    ids=str,
)
def test_sequences_far_apart(draw, far_apart, variant):
    memory, room = far_apart
    place = 0

    def spread(x):
        nonlocal place
        if x.dim() < 3 or x.element_size() != 2:
            return x
        offset, place = place, place + -(-x[0].numel() // 64) * 64
        assert place <= 2**26
        view = memory.view(x.dtype).as_strided(x.shape, (room, *x.stride()[1:]), offset)
        return view.copy_(x)

    arguments = variant.draw(draw, 577)
    want = variant.run(arguments)
    spread_out = {
        name: each(spread, x) if name in ("query", "key", "value", "keys", "values") else x
        for name, x in arguments.items()
    }
    assert_same_bits(variant.call(spread_out), want)


def test_bytes_past_two_to_the_31():
    """One cache of more than 2^31 bytes; the last rows move, in and out of place."""
    dim, kept = 128, 1000
    length = 2**31 // dim + 4096
    if torch.cuda.mem_get_info()[0] < 2 * length * dim + 2**30:
        pytest.skip("needs 5 GiB of free GPU memory")
    key, value = (torch.zeros(1, 1, length, dim, dtype=torch.int8, device="cuda") for _ in range(2))
    for x in (key, value):
        x[:, :, -kept:] = torch.randint(-99, 99, (kept, dim), dtype=torch.int8, device="cuda")
    want = [x[:, :, -kept:].clone() for x in (key, value)]
    indices = torch.arange(length - kept, length, device="cuda")[None]
    for in_place in (False, True):
        got = flat(vtp.compact_kv([key], [value], indices, in_place=in_place, backend="native"))
        assert_same_bits([x[:, :, :kept] for x in got], want)
