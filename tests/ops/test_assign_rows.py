"""assign_rows: the target of largest cosine, against numpy and by hand."""

import math

import numpy as np
import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels.ops._dispatch import BACKENDS, why_not

OP = "assign_rows"
CPU_BACKENDS = [name for name in BACKENDS if why_not(OP, name, "cpu") is None]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cosines(keys, targets):
    """[N, T] in float64, NaN where there is no target; a row of zeros has cosine 0."""
    keys = keys.double().cpu().numpy()
    out = np.full((len(keys), len(targets)), np.nan)
    norms = np.sqrt((keys * keys).sum(-1))
    for t, row in enumerate(targets.tolist()):
        if row >= 0 and np.isfinite(keys[row]).all():
            with np.errstate(invalid="ignore"):
                both = norms * norms[row]
                out[:, t] = np.where(both > 0, keys @ keys[row] / np.where(both > 0, both, 1), 0)
    return out


def expected(keys, targets, candidates=None):
    """One row after the other, from the definition: for keys whose cosines float64 has exactly, or
    that are far from a tie."""
    out = torch.full(keys.shape[:2], -1)
    for b in range(len(keys)):
        similarity = cosines(keys[b], targets[b])
        for i in range(keys.shape[1]):
            own = (targets[b] == i).nonzero()
            if len(own):
                out[b, i] = own[0, 0]
            elif candidates is not None and not candidates[b, i]:
                continue
            elif keys[b, i].isfinite().all() and not np.isnan(similarity[i]).all():
                out[b, i] = int(np.nanargmax(similarity[i]))  # the first of equals
    return out


def exact(draw, batch, length, dim, dtype=torch.float32):
    """Small integers in four places of a row, so that norms are powers of two: cosines are exact in
    every dtype, and often equal."""
    sign = draw.integers(0, 2, batch, length, 4) * 2 - 1
    size = 2 ** draw.integers(0, 3, batch, length, 1)
    place = draw.integers(0, max(dim // 4, 1), batch, length, 1) * 4 + torch.arange(
        4, device=draw.device
    )
    keys = torch.zeros(batch, length, dim, device=draw.device)
    return keys.scatter(2, place, (sign * size).float()).to(dtype)


def some_targets(draw, batch, length, width, pad=2):
    """Different rows in any order, padding among them."""
    order = draw.uniform(batch, length).argsort(1)[:, :width]
    rows = torch.cat((order, order.new_full((batch, pad), -1)), 1)
    return rows.gather(1, draw.uniform(*rows.shape).argsort(1))


def check(keys, targets, backend, candidates=None):
    got = vtp.assign_rows(keys, targets, candidates=candidates, backend=backend)
    assert got.dtype == torch.int64 and got.device == keys.device
    assert torch.equal(got.cpu(), expected(keys.cpu(), targets.cpu(), candidates))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (4, 20, 64, 136))
def test_exact_cosines_and_their_ties(draw, backend, dim, dtype):
    for length, width in ((1, 1), (70, 5), (70, 70), (131, 33)):
        keys = exact(draw, 2, length, dim, dtype)
        keys[:, ::9] = 0.0
        check(keys, some_targets(draw, 2, length, width), backend, draw.bools(2, length, p=0.8))


def check_nearest(keys, targets, backend):
    """Each row has the target of largest cosine, or one within rounding of it."""
    got = vtp.assign_rows(keys, targets, backend=backend).cpu()
    for b in range(len(keys)):
        similarity = cosines(keys[b], targets[b].cpu())
        chosen = np.take_along_axis(similarity, got[b].numpy()[:, None], 1)[:, 0]
        assert (chosen >= np.nanmax(similarity, 1) - 1e-6).all()


@pytest.mark.parametrize("dim", (1, 33, 300))
def test_the_chosen_target_is_the_nearest(draw, backend, dim):
    for dtype in DTYPES[:3]:
        keys = draw.normal(2, 200, dim, dtype=dtype)
        check_nearest(keys, some_targets(draw, 2, 200, 40), backend)


def test_as_tome_assigns(draw, backend):
    """Even rows are targets, odd rows join the nearest (arXiv 2210.09461)."""
    targets = torch.arange(0, 64, 2, device=draw.device)[None]
    check_nearest(draw.normal(1, 64, 32), targets, backend)


def test_no_scale_changes_what_is_nearest(draw, backend):
    keys = draw.normal(2, 90, 16)
    targets = some_targets(draw, 2, 90, 12)
    want = vtp.assign_rows(keys, targets, backend=backend)
    scaled = keys * 2.0 ** draw.integers(-20, 20, 2, 90, 1)
    assert torch.equal(vtp.assign_rows(scaled, targets, backend=backend), want)


@pytest.mark.parametrize("of_rows, of_targets", [(-130, 50), (-100, 20), (40, -40), (0, -50)])
def test_no_row_is_too_short_for_its_products(draw, backend, of_rows, of_targets):
    """Subnormal rows and squares too small for fast products, beside rows of zeros and of NaN."""
    keys = exact(draw, 2, 90, 20)
    keys[0, ::9], keys[0, 5] = 0.0, math.nan
    targets = some_targets(draw, 2, 90, 12)
    exponents = torch.full((2, 90, 1), of_rows, device=draw.device)
    exponents[0, 60:] = 0
    named = targets[..., None].masked_fill(targets[..., None] < 0, 0)
    exponents.scatter_(1, named, of_targets)
    check(torch.ldexp(keys, exponents).bfloat16(), targets, backend)


def test_what_is_not_finite_is_nobodys(draw, backend):
    keys = exact(draw, 2, 80, 16)
    keys[0, 3::7] = math.nan
    keys[0, 5::11, 2] = -math.inf
    keys[1] = math.nan  # so no target is finite
    check(keys, some_targets(draw, 2, 80, 30), backend)
    keys = keys.to(torch.bfloat16)
    check(keys, some_targets(draw, 2, 80, 30), backend)


def test_a_row_longer_than_float32_counts_as_not_finite(draw, backend):
    keys = torch.ones(1, 6, 8, device=draw.device)
    keys[0, 2], keys[0, 3] = 1e30, 1e-30
    targets = torch.tensor([[2, 5, 1]], device=draw.device)
    got = vtp.assign_rows(keys, targets, backend=backend)
    assert got.tolist() == [[1, 2, 0, 1, 1, 1]]
    keys[0, 0], keys[0, 4] = -1e30, -1.0
    got = vtp.assign_rows(keys, targets, backend=backend)
    assert got.tolist() == [[-1, 2, 0, 1, 1, 1]]


def test_targets_keep_their_own_position(draw, backend):
    keys = torch.ones(1, 5, 4, device=draw.device)  # as like one target as the other
    keys[0, 4] = math.nan
    targets = torch.tensor([[4, 1, 3]], device=draw.device)
    nobody = torch.zeros(1, 5, dtype=torch.bool, device=draw.device)
    got = vtp.assign_rows(keys, targets, candidates=nobody, backend=backend)
    assert got.tolist() == [[-1, 1, -1, 2, 0]]
    got = vtp.assign_rows(keys, targets, backend=backend)
    assert got.tolist() == [[1, 1, 1, 2, 0]]


@pytest.mark.parametrize("batch, length, width, dim", [(0, 3, 2, 4), (2, 0, 3, 4), (2, 5, 0, 4)])
def test_nothing_to_assign(draw, backend, batch, length, width, dim):
    keys = draw.normal(batch, length, dim)
    targets = torch.full((batch, width), -1, device=draw.device)
    assert (vtp.assign_rows(keys, targets, backend=backend) == -1).all()


def test_rows_without_channels_are_alike(draw, backend):
    targets = torch.tensor([[-1, 3, 0]], device=draw.device)
    got = vtp.assign_rows(draw.normal(1, 5, 0), targets, backend=backend)
    assert got.tolist() == [[2, 1, 1, 1, 1]]


def test_layouts(draw, backend):
    keys = exact(draw, 3, 90, 24, torch.float16)
    targets = some_targets(draw, 3, 90, 14)
    candidates = draw.bools(3, 90)
    want = expected(keys.cpu(), targets.cpu(), candidates.cpu())
    wide = torch.full((3, 90, 31), math.nan, dtype=torch.float16, device=draw.device)
    wide[:, :, 3:27] = keys
    for x in (
        wide[:, :, 3:27],  # rows of no alignment
        keys.transpose(0, 1).contiguous().transpose(0, 1),
        keys.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        spread = targets.repeat_interleave(2, 1)[:, ::2]
        got = vtp.assign_rows(x, spread, candidates=candidates.T.contiguous().T, backend=backend)
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("batch, length, width", [(3, 150, 70), (100, 70, 65)])
def test_alone_as_in_the_batch(draw, backend, dtype, batch, length, width):
    """Also where so many rows are taken in larger tiles."""
    keys = draw.normal(batch, length, 40, dtype=dtype)
    if backend == "reference":  # torch's products may round otherwise in a batch
        keys = exact(draw, batch, length, 40, dtype)
    targets = some_targets(draw, batch, length, width)
    got = vtp.assign_rows(keys, targets, backend=backend)
    for b in range(0, batch, 1 + batch // 3):
        alone = vtp.assign_rows(keys[b : b + 1], targets[b : b + 1], backend=backend)
        assert torch.equal(alone[0], got[b])


BAD_TARGETS = {
    r"targets must be within \[0, 9\), or -1 for padding, got 9 at \[1, 0\]": [[0, 3], [9, 1]],
    r"targets must be within \[0, 9\), or -1 for padding, got -2 at \[0, 1\]": [[0, -2], [8, 1]],
    r"targets must name no row twice, row 4 is there twice in sequence 1": [[-1, -1], [4, 4]],
}


@pytest.mark.parametrize("on_cpu", CPU_BACKENDS)
@pytest.mark.parametrize("message", BAD_TARGETS)
def test_bad_targets_are_refused(draw, on_cpu, message):
    targets, keys = torch.tensor(BAD_TARGETS[message]), draw.normal(2, 9, 4)
    with pytest.raises(ValueError, match=message):
        vtp.assign_rows(keys, targets, backend=on_cpu)
    assignment = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        vtp.merge_rows(keys, assignment, targets, backend=on_cpu)


def test_kernels_ignore_targets_out_of_range(draw, backend, emulated):
    """As they are on a GPU, where no check reads them but in debug mode."""
    keys = exact(draw, 2, 70, 16)
    targets = some_targets(draw, 2, 70, 9)
    wild = targets.masked_fill(targets == -1, 70)
    wild[0, 3], wild[1, 4] = -(2**40), 2**40
    if draw.device == "cpu" and not emulated:
        with pytest.raises(ValueError, match="targets must be within"):
            vtp.assign_rows(keys, wild, backend=backend)
        return
    got = vtp.assign_rows(keys, wild, backend=backend)
    want = targets.masked_fill(wild != targets, -1)
    assert torch.equal(got, vtp.assign_rows(keys, want, backend=backend))


KEYS, TARGETS = torch.zeros(2, 9, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"keys": KEYS[0]}, ValueError, r"keys must have shape \[B, N, D\].* got \[9, 4\]"),
        ({"keys": KEYS.long()}, TypeError, r"keys must be .*, got int64"),
        ({"targets": TARGETS[:1]}, ValueError, r"targets must have shape \[B, T\].* got \[1, 3\]"),
        ({"targets": TARGETS.int()}, TypeError, "targets must be int64, got int32"),
        ({"targets": [0]}, TypeError, r"targets must be a tensor \[B, T\], got list"),
        (
            {"candidates": torch.ones(2, 8, dtype=torch.bool)},
            ValueError,
            r"candidates must have shape \[B, N\], here \[2, 9\], got \[2, 8\]",
        ),
        ({"candidates": TARGETS[:, :1].expand(2, 9)}, TypeError, "candidates must be bool"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        vtp.assign_rows(**{"keys": KEYS, "targets": TARGETS, **change})
