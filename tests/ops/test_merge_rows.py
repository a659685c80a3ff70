"""merge_rows: every target merged with its group, against numpy."""

import math

import numpy as np
import pytest
import torch

import vtp_kernels as vtp
from ops.test_assign_rows import CPU_BACKENDS, some_targets

OP = "merge_rows"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("mean", "add_mean", "weighted")


def groups(assignment, targets):
    """By position, the rows of a sequence's groups in ascending order."""
    own = {row: t for t, row in enumerate(targets.tolist()) if row >= 0}
    members = {t: [] for t in own.values()}
    for row, t in enumerate(assignment.tolist()):
        t = own.get(row, t)
        if t in members:
            members[t].append(row)
    return members


def expected(features, assignment, targets, weights, mode):
    """By the definition, one addition after the other, in float32 or for float64 in it."""
    wide = features.double() if features.dtype == torch.float64 else features.float()
    x = wide.cpu().numpy()
    out = np.zeros((*targets.shape, x.shape[2]), x.dtype)
    for b in range(len(x)):
        for t, members in groups(assignment[b], targets[b]).items():
            target = int(targets[b, t])
            if mode == "add_mean":
                members = [row for row in members if row != target]
            total, w = np.zeros_like(x[b, 0]), x.dtype.type(0)
            for row in members:
                weight = x.dtype.type(1 if weights is None else weights[b, row])
                total, w = total + weight * x[b, row], w + weight
            mean = total / w if w > 0 else total
            merged = x[b, target] + mean if mode == "add_mean" else mean
            out[b, t] = merged if w > 0 else x[b, target]
    return torch.from_numpy(out).to(features.dtype)


def drawn(draw, mode, batch, length, width, channels, dtype):
    targets = some_targets(draw, batch, length, width)
    weights = draw.uniform(batch, length) if mode == "weighted" else None
    return {
        "features": draw.normal(batch, length, channels, dtype=dtype),
        "assignment": draw.integers(-3, targets.shape[1], batch, length),
        "targets": targets,
        "weights": weights,
    }


def check(arguments, mode, backend):
    with np.errstate(all="ignore"):
        want = expected(
            **{name: x if x is None else x.cpu() for name, x in arguments.items()}, mode=mode
        )
    got = vtp.merge_rows(**arguments, mode=mode, backend=backend)
    assert got.dtype == arguments["features"].dtype
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_order(draw, backend, mode, dtype):
    """Equal to the last bit: all add in the same order, and multiply before they add."""
    for length, width, channels in ((1, 1, 8), (60, 60, 3), (300, 1, 40), (300, 41, 2100)):
        check(drawn(draw, mode, 2, length, width, channels, dtype), mode, backend)


@pytest.mark.parametrize("mode", MODES)
def test_everybody_in_one_group(draw, backend, mode):
    arguments = drawn(draw, mode, 1, 500, 7, 33, torch.bfloat16)
    position = int((arguments["targets"][0] >= 0).nonzero()[0, 0])
    arguments["assignment"].fill_(position)
    check(arguments, mode, backend)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_in_its_group(draw, backend, mode):
    arguments = drawn(draw, mode, 2, 90, 20, 12, torch.float32)
    arguments["features"][:, 4::17] = math.nan
    arguments["features"][0, 7, 3] = math.inf
    check(arguments, mode, backend)


@pytest.mark.parametrize("mode", MODES)
def test_a_target_alone_stays_as_it_is(draw, backend, mode):
    features = draw.normal(2, 40, 16, dtype=torch.bfloat16)
    targets = some_targets(draw, 2, 40, 9, pad=0)
    nobody = torch.full((2, 40), -1, device=draw.device)
    weights = torch.zeros(2, 40, device=draw.device) if mode == "weighted" else None
    got = vtp.merge_rows(features, nobody, targets, weights=weights, mode=mode, backend=backend)
    assert torch.equal(got, features.gather(1, targets[..., None].expand(-1, -1, 16)))
    if mode == "weighted":  # nor do members without weight move it
        all_ = torch.zeros_like(nobody)
        got = vtp.merge_rows(features, all_, targets, weights=weights, mode=mode, backend=backend)
        assert torch.equal(got[:, 0], features[torch.arange(2), targets[:, 0]])


def test_a_targets_row_is_in_its_own_group_alone(draw, backend):
    features = torch.eye(4, device=draw.device)[None]
    assignment = torch.tensor([[1, 1, 0, 0]], device=draw.device)
    targets = torch.tensor([[0, 2]], device=draw.device)
    got = vtp.merge_rows(features, assignment, targets, backend=backend)
    assert got.tolist() == [[[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]]]


def test_by_nearest_target(draw, backend):
    """The two ops together, on VisionZip's contextual tokens: every tenth row is a target."""
    keys = draw.normal(2, 120, 16)
    features = draw.normal(2, 120, 24)
    targets = torch.arange(5, 120, 10, device=draw.device).expand(2, -1)
    candidates = draw.bools(2, 120, p=0.9)
    arguments = {
        "features": features,
        "assignment": vtp.assign_rows(keys, targets, candidates=candidates),
        "targets": targets,
        "weights": None,
    }
    check(arguments, "add_mean", backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "batch, length, width, channels", [(0, 3, 2, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)]
)
def test_nothing_to_merge(draw, backend, mode, batch, length, width, channels):
    features = draw.normal(batch, length, channels)
    targets = torch.full((batch, width), -1, device=draw.device)
    weights = draw.uniform(batch, length) if mode == "weighted" else None
    assignment = torch.full((batch, length), -1, device=draw.device)
    got = vtp.merge_rows(features, assignment, targets, weights=weights, mode=mode, backend=backend)
    assert got.shape == (batch, width, channels) and not got.any()


@pytest.mark.parametrize("mode", MODES)
def test_layouts(draw, backend, mode):
    plain = drawn(draw, mode, 3, 70, 12, 24, torch.float16)
    wide = draw.normal(3, 70, 31, dtype=torch.float16)
    wide[:, :, 3:27] = plain["features"]
    for x in (wide[:, :, 3:27], plain["features"].transpose(0, 2).contiguous().transpose(0, 2)):
        spread = {
            "features": x,
            "assignment": plain["assignment"].T.contiguous().T,
            "targets": plain["targets"].repeat_interleave(2, 1)[:, ::2],
            "weights": None if mode != "weighted" else plain["weights"].half().T.contiguous().T,
        }
        check(spread, mode, backend)


@pytest.mark.parametrize("mode", MODES)
def test_alone_as_in_the_batch(draw, backend, mode):
    arguments = drawn(draw, mode, 3, 130, 17, 40, torch.bfloat16)
    got = vtp.merge_rows(**arguments, mode=mode, backend=backend)
    for b in range(3):
        alone = {name: x if x is None else x[b : b + 1] for name, x in arguments.items()}
        assert torch.equal(vtp.merge_rows(**alone, mode=mode, backend=backend)[0], got[b])


FEATURES, ASSIGNMENT = torch.zeros(2, 9, 4), torch.zeros(2, 9, dtype=torch.int64)
TARGETS = torch.tensor([[3, 1], [8, -1]])
WEIGHTS = torch.ones(2, 9)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \[B, N, C\]"),
        ({"assignment": ASSIGNMENT[:, 1:]}, ValueError, r"assignment must have shape \[B, N\]"),
        ({"assignment": ASSIGNMENT.int()}, TypeError, "assignment must be int64, got int32"),
        ({"targets": TARGETS[:1]}, ValueError, r"targets must have shape \[B, T\]"),
        ({"mode": "sum"}, ValueError, r"mode must be one of \('mean', .* got 'sum'"),
        ({"mode": "weighted"}, ValueError, "weights must be given with .* got None with"),
        ({"weights": WEIGHTS}, ValueError, "weights must be given with .* got a tensor with"),
        (
            {"weights": WEIGHTS[:, 1:], "mode": "weighted"},
            ValueError,
            r"weights must have shape \[B, N\], here \[2, 9\], got \[2, 8\]",
        ),
        ({"weights": ASSIGNMENT, "mode": "weighted"}, TypeError, "weights must be float16 or"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    given = {"features": FEATURES, "assignment": ASSIGNMENT, "targets": TARGETS}
    with pytest.raises(error, match=message):
        vtp.merge_rows(**{**given, **change})


@pytest.mark.parametrize("on_cpu", CPU_BACKENDS)
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("assignment", 2, r"assignment must be below the 2 targets, got 2 at \[1, 4\]"),
        ("weights", -0.5, r"weights must be finite and at least 0, got -0.5 at \[1, 4\]"),
        ("weights", math.inf, r"weights must be finite and at least 0, got inf at \[1, 4\]"),
        ("weights", math.nan, r"weights must be finite and at least 0, got nan at \[1, 4\]"),
    ],
)
def test_bad_values_are_refused(on_cpu, name, value, message):
    given = {"features": FEATURES, "assignment": ASSIGNMENT, "targets": TARGETS, "weights": WEIGHTS}
    given[name] = given[name].clone()
    given[name][1, 4] = value
    with pytest.raises(ValueError, match=message):
        vtp.merge_rows(**given, mode="weighted", backend=on_cpu)


def test_kernels_leave_out_positions_out_of_range(draw, backend, emulated):
    """As they are on a GPU, where no check reads them but in debug mode."""
    arguments = drawn(draw, "mean", 2, 70, 9, 24, torch.float32)
    wild = arguments["assignment"].clone()
    wild[0, ::7], wild[1, 5] = arguments["targets"].shape[1], 2**40
    if draw.device == "cpu" and not emulated:
        with pytest.raises(ValueError, match="assignment must be below"):
            vtp.merge_rows(**{**arguments, "assignment": wild}, backend=backend)
        return
    left_out = {**arguments, "assignment": wild.masked_fill(wild != arguments["assignment"], -1)}
    got = vtp.merge_rows(**{**arguments, "assignment": wild}, backend=backend)
    assert torch.equal(got, vtp.merge_rows(**left_out, backend=backend))
