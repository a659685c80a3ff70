"""What kernels are made of does what it says: collectives, reductions, products, conversions."""

import numpy as np
import pytest
import torch

LANES = 32
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def primitives(kernels, order):
    return kernels.primitives


def integers(draw, *shape, low=-1000, high=1000):
    return draw.integers(low, high, *shape, dtype=torch.int32).numpy()


# ---- Warp collectives ----------------------------------------------------------------------------


def shuffled(kind, values, operand, width):
    """CUDA's definition of a shuffle, lane by lane."""
    out = values.copy()
    for i in range(len(values)):
        warp, lane = divmod(i, LANES)
        first = lane // width * width
        source = {
            "from": first + operand % width,
            "up": lane - operand if lane - operand >= first else lane,
            "down": lane + operand if lane + operand < first + width else lane,
            "xor": lane ^ operand if (lane ^ operand) < first + width else lane,
        }[kind]
        out[i] = values[warp * LANES + source]
    return out


@pytest.mark.parametrize("kind", ["from", "up", "down", "xor"])
def test_shuffles(primitives, draw, kind):
    values = integers(draw, 3 * LANES)
    for width in (2, 4, 8, 16, 32):
        for operand in {0, 1, width // 2, width - 1, 31}:
            expected = shuffled(kind, values, operand, width)
            result = primitives.shuffle_int32(kind, values, operand, width)
            assert (result == expected).all(), (kind, width, operand)
            doubles = primitives.shuffle_float64(kind, values / 3, operand, width)
            assert (doubles == expected / 3).all(), (kind, width, operand)


def test_votes(primitives, draw):
    for high in (1, 2, 3, 40):
        values = integers(draw, 2 * LANES, low=0, high=high)
        ballot, any_, all_, match = primitives.vote(values)
        for i, x in enumerate(values):
            lanes = values[i // LANES * LANES :][:LANES]
            assert ballot[i] == sum(int(y != 0) << lane for lane, y in enumerate(lanes))
            assert any_[i] == lanes.any() and all_[i] == lanes.all()
            assert match[i] == sum(int(y == x) << lane for lane, y in enumerate(lanes))


def test_block_votes(primitives, draw):
    for high in (1, 2, 100):
        values = integers(draw, 3 * LANES, low=0, high=high)
        count, any_, all_ = primitives.block_vote(values)
        assert (count == np.count_nonzero(values)).all()
        assert (any_ == values.any()).all() and (all_ == values.all()).all()


# ---- csrc/vtp/warp.cuh ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_warp_reductions(primitives, draw, width, dtype):
    values = integers(draw, 2 * LANES, low=-(2**31), high=2**31 - 1).astype(dtype)
    sums, maxima, minima = (
        result.reshape(-1, width)
        for result in getattr(primitives, f"warp_reduce_{dtype.__name__}")(values, width)
    )
    groups = values.reshape(-1, width)
    assert (sums == groups.sum(1, keepdims=True, dtype=dtype)).all()  # integers wrap around
    assert (maxima == groups.max(1, keepdims=True)).all()
    assert (minima == groups.min(1, keepdims=True)).all()


@pytest.mark.parametrize("threads", [32, 64, 96, 128, 256, 512, 1024])
def test_block_reductions_and_scans(primitives, draw, threads):
    values = integers(draw, threads)
    sums, maxima, before, total = primitives.block_operations(values)
    assert (sums == values.sum()).all() and (maxima == values.max()).all()
    assert (before == np.cumsum(values) - values).all() and (total == values.sum()).all()


# ---- csrc/vtp/mma.cuh ----------------------------------------------------------------------------


def bits_of(x):
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_product(primitives, draw, dtype):
    multiply = getattr(primitives, f"mma_{dtype}")

    def check(a, b, d, **tolerance):
        result = multiply(bits_of(a.to(DTYPES[dtype])), bits_of(b.to(DTYPES[dtype])), d.numpy())
        expected = a.to(DTYPES[dtype]).double() @ b.to(DTYPES[dtype]).double() + d
        torch.testing.assert_close(torch.from_numpy(result).double(), expected, **tolerance)

    ones, exact = torch.ones(16, 16), {"rtol": 0, "atol": 0}
    check(ones, torch.ones(16, 8), torch.zeros(16, 8), **exact)
    # Small integers: every position counts and no sum rounds.
    small = [draw.integers(-8, 9, *shape).float() for shape in ((16, 16), (16, 8), (16, 8))]
    check(*small, **exact)
    normal = [draw.normal(*shape) for shape in ((16, 16), (16, 8), (16, 8))]
    check(*normal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_the_instruction_does(primitives, draw, transposed):
    tile = draw.integers(0, 2**16, LANES, 8).numpy().astype(np.uint16)
    registers = primitives.load_matrices(tile, transposed)
    for lane in range(LANES):
        for m in range(4):
            matrix = tile[8 * m : 8 * m + 8]
            row = (matrix.T if transposed else matrix)[lane // 4]
            low, high = (int(row[2 * (lane % 4) + i]) for i in range(2))
            assert registers[lane, m] == low | high << 16


# ---- Conversions ---------------------------------------------------------------------------------


def same_bits_or_nan(x, y):
    return ((x == y) | (torch.isnan(x) & torch.isnan(y))).all() and (
        torch.signbit(x) == torch.signbit(y)
    )[~torch.isnan(x)].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_values_of_16_bits_widen_exactly(primitives, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    result = torch.from_numpy(getattr(primitives, f"{dtype}_to_float")(bits))
    expected = torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype]).float()
    assert same_bits_or_nan(result, expected)
    # And back, to the same bits.
    back = getattr(primitives, f"float_to_{dtype}")(result.numpy())
    assert (back == bits)[~torch.isnan(expected).numpy()].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_narrow_to_nearest_ties_to_even(primitives, draw, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype]).float()
    finite = values[torch.isfinite(values)].sort()[0]
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()  # exact in float
    limits = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, 65519.996, 65520.0])
    hard = [ties, ties.nextafter(values.new_tensor(torch.inf))]
    hard += [ties.nextafter(values.new_tensor(-torch.inf)), limits, -limits]
    any_bits = draw.integers(-(2**31), 2**31, 2**14, dtype=torch.int64).to(torch.int32)
    x = torch.cat([*hard, any_bits.view(torch.float32)])
    x = torch.nn.functional.pad(x, (0, -len(x) % LANES))
    narrow = getattr(primitives, f"float_to_{dtype}")(x.numpy())
    result = torch.from_numpy(narrow.view(np.int16)).view(DTYPES[dtype])
    assert same_bits_or_nan(result.float(), x.to(DTYPES[dtype]).float())


def test_sortable_keys_sort_like_scores(primitives, draw):
    x = torch.cat([draw.normal(120), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    x = torch.cat([x, torch.tensor([torch.nan, -torch.nan, 1e-45, -1e-45])])
    keys, scores = primitives.sortable(x.numpy())
    ranks = torch.where(torch.isnan(x), -torch.inf, x).double()
    ranks[torch.isnan(x)] = -torch.finfo(torch.float64).max
    ranks[x == -torch.inf] = -torch.finfo(torch.float32).max * 2.0
    order = torch.from_numpy(keys.astype(np.int64))
    assert ((order[:, None] < order) == (ranks[:, None] < ranks)).all()
    assert same_bits_or_nan(torch.from_numpy(scores), torch.where(x == 0, 0.0, x))
    assert keys.min() > 0 and keys.max() < 2**32 - 1
