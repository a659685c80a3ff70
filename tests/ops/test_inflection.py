"""inflection against kneed, NumPy and plain loops: equal sets, on any curve."""

import math
import warnings

import numpy as np
import pytest
import torch

import vtp_kernels as vtp

OP = "inflection"
RULES = ("chord", "kneedle", "iqr", "mass")
LENGTHS = (0, 1, 2, 3, 31, 576, 577, 2880, 10000)
NAN, INF = math.nan, math.inf


#: What two roundings to a dtype come to, as a share of a number; some more for the arithmetic of
#: float64, in which the knee is sought.
ROUNDING = {
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
    torch.float32: 2.0**-23,
    torch.float64: 2.0**-49,
}


def chord(y, rounding):
    last = len(y) - 1
    best, knee = rounding * max(abs(y[0]), abs(y[last])) * last, None
    for i, score in enumerate(y):
        distance = (y[0] - score) * last - i * (y[0] - y[last])
        if distance > best:
            best, knee = distance, i
    return knee


def kneed_locator(y, sensitivity):
    KneeLocator = pytest.importorskip("kneed").KneeLocator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KneeLocator(
            range(len(y)), y, S=sensitivity, curve="convex", direction="decreasing", online=False
        )


def kneedle(y, sensitivity):
    """kneed's walk with the exact step 1 / (n - 1) of x.

    kneed takes the mean of the rounded steps. That differs in the last bit, which decides where the
    two best scores are equal: d_1 is then exactly one step below d_0.
    """
    locator = kneed_locator(y, sensitivity)
    locator.Tmx = locator.y_difference_maxima - sensitivity * (1.0 / (len(y) - 1))
    knee, _ = locator.find_knee()
    return None if knee is None else int(knee)


def iqr(y):
    q1, q3 = np.percentile(y, [25, 75])
    above = int((np.array(y) > q3 + 1.5 * (q3 - q1)).sum())
    return above - 1 if above else None


def mass(y, share):
    total = 0.0
    sums = []
    for score in y:
        total += max(score, 0.0)
        sums.append(total)
    return next((i for i, held in enumerate(sums) if total > 0 and held >= share * total), None)


def expected(
    curve,
    rule="chord",
    min_keep=1,
    max_keep=None,
    clip_quantile=0.995,
    sensitivity=1.0,
    share=0.9,
):
    """The chosen indices of each row, ascending."""
    rows = []
    for scores in curve.double().tolist():
        order = sorted(
            range(len(scores)),
            key=lambda i, s=scores: (math.isnan(s[i]), 0.0 if math.isnan(s[i]) else -s[i], i),
        )
        y = [scores[i] for i in order if math.isfinite(scores[i])]
        if y and rule in ("chord", "kneedle"):
            cap = float(np.quantile(y, clip_quantile))
            y = [min(score, cap) for score in y]
        knee = None
        if len(y) >= 3 and y[0] > y[-1]:
            knee = {
                "chord": lambda y=y: chord(y, ROUNDING[curve.dtype]),
                "kneedle": lambda y=y: kneedle(y, sensitivity),
                "iqr": lambda y=y: iqr(y),
                "mass": lambda y=y: mass(y, share),
            }[rule]()
        count = len(scores) if knee is None else sum(s == INF for s in scores) + knee + 1
        count = min(max(count, min_keep), len(scores) if max_keep is None else max_keep)
        rows.append(sorted(order[:count]))
    return rows


def check(selection, rows, capacity):
    indices, counts = selection
    assert indices.dtype == torch.int64 and counts.dtype == torch.int32
    assert indices.shape == (len(rows), capacity)
    assert counts.tolist() == [len(row) for row in rows]
    assert indices.tolist() == [row + [-1] * (capacity - len(row)) for row in rows]


def curves(draw, length):
    """[14, length]: long-tailed as similarities are, and everything that goes wrong."""
    normal, uniform = draw.normal(length), draw.uniform(length).clamp(min=1e-7)
    exponential = -uniform.log()
    sinks = torch.where(draw.bools(length, p=3 / max(length, 3)), 50.0, normal.exp())
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0], device=draw.device)
    ramp = torch.arange(length, device=draw.device) / max(length, 1)
    return torch.stack(
        [
            normal,
            normal.exp(),
            exponential,
            uniform**-0.7,
            sinks,
            normal.tanh(),
            1.0 - exponential,  # concave
            draw.integers(0, 5, length).float(),
            torch.full_like(normal, -0.5),
            ramp,
            torch.full_like(normal, NAN),
            torch.where(draw.bools(length, p=0.2), NAN, exponential),
            torch.where(
                draw.bools(length, p=0.2), special[draw.integers(0, 5, length)], exponential
            ),
            exponential * 2.0**-140,  # subnormal
        ]
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(draw, backend, rule, length):
    curve = curves(draw, length)
    if rule == "kneedle" and length == 10000:
        curve = curve[:5]  # kneed takes a second a curve
    check(vtp.inflection(curve, rule=rule, backend=backend), expected(curve, rule), length)


@pytest.mark.parametrize("rule", RULES)
def test_options(draw, backend, rule):
    for _ in range(12):
        length = draw.integer(1, 120)
        curve = curves(draw, length)
        min_keep = draw.integer(0, 30)
        max_keep = min_keep + draw.integer(0, 100) if draw.bools(1) else None
        options = {
            "rule": rule,
            "min_keep": min_keep,
            "max_keep": max_keep,
            "clip_quantile": [1.0, 0.995, 0.9, 0.5, 0.01][draw.integer(0, 5)],
            "sensitivity": [0.0, 0.5, 1.0, 3.0, 10.0][draw.integer(0, 5)],
        }
        share = [0.01, 0.5, 0.9, 1.0][draw.integer(0, 4)]
        got = vtp.inflection(curve, **options, mass=share, backend=backend)
        capacity = length if max_keep is None else min(max_keep, length)
        check(got, expected(curve, **options, share=share), capacity)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_agrees_with_kneed(draw, backend, dtype):
    """Many curves with one best score, nothing clipped: exactly kneed's first knee."""
    for _ in range(40):
        curve = curves(draw, draw.integer(3, 150))[[0, 1, 2, 3, 5, 6, 9]].double()
        curve += 1e-9 * draw.uniform(*curve.shape, dtype=torch.float64)
        best = curve.to(dtype).topk(2).values
        curve = curve.to(dtype)[best[:, 0] > best[:, 1]]
        for sensitivity in (0.0, 1.0, 4.0):
            options = {"rule": "kneedle", "clip_quantile": 1.0, "sensitivity": sensitivity}
            counts = vtp.inflection(curve, **options, backend=backend).counts.tolist()
            for row, count in zip(curve.sort(descending=True)[0].tolist(), counts, strict=True):
                knee = kneed_locator(row, sensitivity).knee
                assert count == (len(row) if knee is None else knee + 1)


def test_agrees_with_kneed_on_a_thousand_random_curves(draw, backend):
    """As they come: 50 lengths, 20 curves each of five kinds, of which one has its best scores
    equal now and then; those are the walk's with the exact step."""
    seen = 0
    for _ in range(50):
        curve = curves(draw, draw.integer(3, 120))[[0, 1, 2, 3, 5]].repeat(4, 1)
        curve = curve + 1e-3 * draw.normal(*curve.shape)
        got = vtp.inflection(curve, rule="kneedle", clip_quantile=1.0, backend=backend)
        ranked = curve.double().sort(descending=True)[0].tolist()
        for row, count in zip(ranked, got.counts.tolist(), strict=True):
            if row[0] > row[1]:
                knee = kneed_locator(row, 1.0).knee
            else:
                knee = kneedle(row, 1.0)
            assert count == (len(row) if knee is None else knee + 1)
            seen += 1
    assert seen == 1000


def test_mass_is_summed_as_the_reference_sums_it(draw, backend):
    """In float64, one by one from the best: where a great score comes first, the order of the small
    ones behind it decides what their sum is rounded to."""
    for length in (300, 5000):
        small = 2.0**-29 * (1 + draw.uniform(3, length - 1))
        curve = torch.cat((torch.full_like(small[:, :1], 1 - 2.0**-24), small), dim=1)
        for share in (1.0, 1 - 2.0**-30, 0.999):
            got = vtp.inflection(curve, rule="mass", mass=share, backend=backend)
            want = vtp.inflection(curve, rule="mass", mass=share, backend="reference")
            assert torch.equal(got.counts, want.counts)
            assert torch.equal(got.indices, want.indices)


def test_agrees_with_numpy_percentile(draw, backend):
    for _ in range(30):
        curve = curves(draw, draw.integer(3, 150))[:10]
        got = vtp.inflection(curve, rule="iqr", backend=backend)
        for row, count in zip(curve.double().cpu().numpy(), got.counts.tolist(), strict=True):
            q1, q3 = np.percentile(row, [25, 75])
            outliers = int((row > q3 + 1.5 * (q3 - q1)).sum())
            assert count == (outliers or len(row))


def test_known_curves(backend, device):
    """Counts found by hand."""

    def count(scores, **options):
        curve = torch.tensor([scores], device=device)
        return vtp.inflection(curve, **options, backend=backend).counts.item()

    elbow = [10.0, 9.0, 8.0, 1.0, 0.9, 0.8, 0.7, 0.6]
    assert count(elbow, clip_quantile=1.0) == 4  # the knee itself is kept
    assert count(elbow, rule="kneedle", clip_quantile=1.0) == 4
    assert count([1.0] * 20 + [2.0, 3.0, 40.0], rule="iqr") == 3
    assert count([5.0, 3.0, 1.0, 1.0], rule="mass", mass=0.8) == 2
    assert count([5.0, 3.0, 1.0, 1.0], rule="mass", mass=0.81) == 3
    assert count([5.0, -3.0, 5.0, -9.0], rule="mass", mass=1.0) == 2
    assert count([2.0, 1.0, 0.0], clip_quantile=1.0) == 3  # straight: no knee
    assert count([8.0, 7.0, 5.0, 3.0, 0.0], clip_quantile=1.0) == 5  # above its chord: no knee
    # Twice as far below the chord: the first. Farther above it than below: the point below.
    assert count([8.0, 5.0, 4.0, 1.0, 0.0], clip_quantile=1.0) == 2
    assert count([8.0, 7.9, 7.8, 1.5, 0.0], clip_quantile=1.0) == 4
    assert count([0.0, 0.0, 0.0, 9.0], clip_quantile=1.0) == 2


def farthest_below(curve, clip_quantile):
    """By NumPy, per row: the length of the head that ends where the sorted curve, in a square of
    side 1, lies farthest below the diagonal; all of the row where it nowhere does."""
    ranked = -np.sort(-curve.double().numpy(), axis=1)
    ranked = np.minimum(ranked, np.quantile(ranked, clip_quantile, axis=1, keepdims=True))
    height = (ranked - ranked[:, -1:]) / (ranked[:, :1] - ranked[:, -1:])
    depth = np.linspace(1, 0, curve.shape[1]) - height
    return np.where(depth.max(1) > 1e-5, depth.argmax(1) + 1, curve.shape[1])


def head(curve, counts):
    """Which tokens are the best `counts` of each row; no two scores may be equal."""
    order = np.argsort(-curve.double().numpy(), axis=1)
    return [sorted(row[:count].tolist()) for row, count in zip(order, counts, strict=True)]


def distinct(curve):
    return curve[[len(row.unique()) == curve.shape[1] for row in curve]]


@pytest.mark.parametrize("clip_quantile", (1.0, 0.995))
def test_chord_of_each_shape_of_curve(draw, backend, clip_quantile):
    """Sets equal to NumPy's. A long tail keeps its head. So does what spreads evenly about a mean,
    whose lower shoulder is as far above the chord as the head is below. An upper shoulder alone is
    never below the chord and keeps everything."""
    length = 400
    drops = draw.uniform(40, length, dtype=torch.float64) + 0.1
    falling, rising = drops.sort(descending=True)[0], drops.sort()[0]
    # Shares kept: bounds of the median of the rows, and of every row. Of rows drawn by chance one
    # in 40,000 keeps more than 0.3 of a long tail, so that is no bound of every row.
    for shape, median, every in (
        (draw.normal(40, length).exp(), (0.05, 0.2), (0.005, 0.5)),
        (draw.normal(40, length), (0.05, 0.2), (0.01, 0.5)),
        (-falling.cumsum(1), (0.4, 0.6), (0.2, 0.6)),  # convex
        (-rising.cumsum(1), (1.0, 1.0), (1.0, 1.0)),  # concave
    ):
        places = torch.argsort(draw.uniform(40, length), dim=1)
        curve = distinct(shape.float().gather(1, places).cpu())
        assert len(curve) > 20
        counts = farthest_below(curve, clip_quantile)
        got = vtp.inflection(curve.to(draw.device), clip_quantile=clip_quantile, backend=backend)
        check(got, head(curve, counts), length)
        for share, (fewest, most) in ((np.median(counts), median), (counts, every)):
            assert np.all((fewest * length <= share) & (share <= most * length))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
def test_rounding_makes_no_knee_of_a_straight_line(draw, backend, dtype):
    for _ in range(40):
        length = draw.integer(3, 700)
        place = torch.arange(length, device=draw.device, dtype=torch.float64)
        offset, slope = draw.normal(2, 8, 1, dtype=torch.float64)
        line = (offset + slope.abs() * 2.0 ** draw.integer(-8, 3) * place / length).to(dtype)
        for clip_quantile in (1.0, 0.995):
            got = vtp.inflection(line, clip_quantile=clip_quantile, backend=backend)
            assert got.counts.tolist() == [length] * 8


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
def test_a_dent_deeper_than_rounding_is_a_knee(device, backend, dtype):
    line = 1.0 - torch.arange(9, device=device, dtype=torch.float64) / 8
    for dent in range(1, 8):
        for depth, count in ((0.5, 9), (1.0, 9), (2.0, dent + 1)):
            bent = line.clone()
            bent[dent] -= depth * ROUNDING[dtype]
            assert torch.equal(bent.to(dtype).double(), bent)
            got = vtp.inflection(bent[None].to(dtype), clip_quantile=1.0, backend=backend)
            assert got.counts.item() == count


def test_clipping_restores_what_sinks_hide(draw, backend):
    """Three sinks bend the chord of a long-tailed curve of 576; clipped it is as without them."""
    curve = draw.normal(16, 576).exp()
    without = vtp.inflection(curve, backend=backend).counts.float().mean()
    curve[:, :3] = 300.0
    bent = vtp.inflection(curve, clip_quantile=1.0, backend=backend).counts.float().mean()
    clipped = vtp.inflection(curve, clip_quantile=0.99, backend=backend).counts.float().mean()
    assert bent < 0.6 * without and abs(clipped - without) < 0.35 * without


@pytest.mark.parametrize("rule", RULES)
def test_no_knee(backend, device, rule):
    """Flat, all NaN, too few finite scores: the first max_keep by rank, all by default."""
    flat = [0.3] * 6
    few = [NAN, 1.0, -INF, NAN, 2.0, NAN]
    curve = torch.tensor([flat, [NAN] * 6, few, [-INF] * 6, [INF] * 6], device=device)
    got = vtp.inflection(curve, rule=rule, backend=backend)
    check(got, [list(range(6))] * 5, 6)
    got = vtp.inflection(curve, rule=rule, max_keep=2, backend=backend)
    check(got, [[0, 1], [0, 1], [1, 4], [0, 1], [0, 1]], 2)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("rule", RULES)
def test_dtypes(draw, backend, dtype, rule):
    curve = curves(draw, 133).to(dtype)
    check(vtp.inflection(curve, rule=rule, backend=backend), expected(curve, rule), 133)


def test_strides(draw, backend):
    wide = curves(draw, 201)
    for view in (
        (slice(None), slice(1, None)),
        (slice(None, None, 2), slice(3, 150)),
        (slice(None), slice(None, None, 2)),
    ):
        curve = wide[view]
        got = vtp.inflection(curve, backend=backend)
        check(got, expected(curve), curve.shape[1])
    row = wide[1:2].expand(4, -1)
    check(vtp.inflection(row, backend=backend), expected(row), 201)


def test_empty_batch(draw, backend):
    check(vtp.inflection(draw.normal(0, 12), backend=backend), [], 12)


@pytest.mark.parametrize("op", ("inflection", "cls_inflection"))
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rule": "elbow"}, ValueError, "rule must be one of .* got 'elbow'"),
        ({"min_keep": -1}, ValueError, "min_keep must be at least 0"),
        ({"min_keep": 1.0}, TypeError, "min_keep must be an int"),
        ({"min_keep": 5, "max_keep": 4}, ValueError, "max_keep must be at least min_keep, 5"),
        ({"max_keep": "all"}, TypeError, "max_keep must be an int"),
        ({"clip_quantile": 0.0}, ValueError, r"clip_quantile must be within \(0, 1\], got 0.0"),
        ({"clip_quantile": 99.5}, ValueError, "clip_quantile must be within"),
        ({"clip_quantile": NAN}, ValueError, "clip_quantile must be within"),
        ({"clip_quantile": None}, TypeError, "clip_quantile must be a number"),
        ({"mass": 1.5}, ValueError, "mass must be within"),
        ({"sensitivity": -1}, ValueError, "sensitivity must be finite and at least 0"),
        ({"sensitivity": INF}, ValueError, "sensitivity must be finite"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(op, change, error, message):
    inputs = {"inflection": [(2, 9)], "cls_inflection": [(2, 9, 4), (2, 4)]}[op]
    with pytest.raises(error, match=message):
        getattr(vtp, op)(*(torch.zeros(shape) for shape in inputs), **change)


@pytest.mark.parametrize(
    "curve, error, message",
    [
        (torch.zeros(9), ValueError, r"curve must have shape \[B, N\].* got \[9\]"),
        (torch.zeros(2, 9).long(), TypeError, "curve must be float16 .* got int64"),
        (np.zeros((2, 9)), TypeError, "curve must be a tensor .* got ndarray"),
    ],
)
def test_bad_curve(curve, error, message):
    with pytest.raises(error, match=message):
        vtp.inflection(curve)
