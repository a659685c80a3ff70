"""select_diverse against plain loops in float64, written from the formulas of the papers.

DivPrune: the row whose nearest other is farthest, then the row whose smallest distance to those
chosen is largest. CDPruner: the row that adds most to a determinant. Where cosines are exact every
pick must be the first of the best; where they are rounded it must be one of the best but for that.
"""

import itertools
import math

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels import _native
from vtp_kernels.reference import NOTHING_LEFT

OP = "select_diverse"
NAN, INF = math.nan, math.inf
RULES = ("maxmin", "dpp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- the formulas -------------------------------------------------------------------------------


def cosines(features):
    """[N, N] in float64; rows that are not finite count as zeros."""
    x = features.double().cpu()
    x = x.masked_fill(~x.isfinite().all(1, keepdim=True), 0.0)
    x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    norm = x.norm(dim=1)
    return ((x @ x.T) / (norm[:, None] * norm)).nan_to_num(0.0, 0.0, 0.0)


def divprune_scores(cosine, chosen, others):
    """others -> how far each is from what is chosen or, with nothing chosen, from its nearest."""
    distance = (1.0 - cosine).tolist()
    return {
        i: min((distance[i][j] for j in chosen or others if j != i), default=INF) for i in others
    }


def cdpruner_scores(cosine, relevance, chosen, others):
    """others -> sqrt of det L[chosen + i] / det L[chosen]; only those of which anything is left."""
    across = cosine[:, chosen]
    inverse = torch.linalg.pinv(cosine[chosen][:, chosen], hermitian=True, rtol=1e-9)
    left = cosine.diagonal() - ((across @ inverse) * across).sum(1)
    gain = relevance.double().cpu().abs() * left.clamp(min=0.0).sqrt()
    return {i: gain[i].item() for i in others if left[i] > NOTHING_LEFT and gain[i] > 0.0}


def in_order(features, steps, backend, **options):
    """For each row of the batch, what it chooses in its steps 1, 2, ... `steps`."""

    def repeated(x):
        return x.repeat_interleave(steps, 0) if isinstance(x, torch.Tensor) else x

    batch, length, _ = features.shape
    k = torch.arange(1, steps + 1, device=features.device).repeat(batch)
    options = {name: repeated(x) for name, x in options.items()}
    selection = vtp.select_diverse(
        repeated(features), k, capacity=length, backend=backend, **options
    )
    keep = options.get("keep")
    rows = []
    for n, indices in enumerate(selection.indices.tolist()):
        kept = set() if keep is None else set(keep[n].nonzero()[:, 0].tolist())
        chosen = {i for i in indices if i >= 0}
        assert len(chosen) == selection.counts[n] and kept <= chosen
        rows.append(chosen - kept)
    orders = []
    for b in range(batch):
        order, before = [], set()
        for chosen in rows[b * steps : (b + 1) * steps]:
            assert before <= chosen and len(chosen - before) <= 1
            order += chosen - before
            before = chosen
        orders.append(order)
    return orders


def follow(order, steps, features, *, rule, candidates, keep, relevance, first, slack):
    """Checks every pick of one row of the batch: among the best but for `slack`, the first of the
    best where that is 0."""
    rows = range(len(features))
    finite = features.isfinite().all(1)
    competing = [i for i in rows if candidates[i] and not keep[i]]
    chosen = [i for i in rows if keep[i] and finite[i]]
    others = [i for i in competing if finite[i]]
    cosine, largest = cosines(features), relevance.abs().max()
    for pick in order:
        if not others and rule == "maxmin":
            assert pick == min(i for i in competing if i not in chosen)
            chosen.append(pick)
            continue
        if rule == "maxmin":
            scores = divprune_scores(cosine, chosen, others)
            if not chosen and first in others:
                scores = {first: 0.0}
        else:
            scores = cdpruner_scores(cosine, relevance, chosen, others)
        best = max(scores.values())
        assert scores[pick] >= best - slack * largest, (pick, scores)
        if slack == 0:
            assert pick == min(i for i in scores if scores[i] == best), (pick, scores)
        chosen.append(pick)
        others.remove(pick)
    if rule == "maxmin":
        assert len(order) == min(steps, len(competing))
    elif len(order) < min(steps, len(others)):
        assert not cdpruner_scores(cosine, relevance, chosen, others)


def check(features, steps, backend, *, slack, rule="maxmin", first="farthest", **options):
    orders = in_order(features, steps, backend, rule=rule, first=first, **options)
    everything = torch.ones(features.shape[:2])
    given = {
        "candidates": options.get("candidates", everything.bool()),
        "keep": options.get("keep", ~everything.bool()),
        "relevance": options.get("relevance", everything),
    }
    for b, order in enumerate(orders):
        row = {name: x[b] for name, x in given.items()}
        follow(order, steps, features[b], rule=rule, first=first, slack=slack, **row)


# --- inputs -------------------------------------------------------------------------------------


def signs(draw, batch, length, channels):
    """Rows of 1, 4 or 16 entries of +-1, times powers of two: their cosines are exact, and many of
    them equal."""
    order = draw.uniform(batch, length, channels).argsort(-1).argsort(-1)
    entries = torch.tensor([1, 4, 16], device=draw.device)[draw.integers(0, 3, batch, length, 1)]
    entries = torch.where(entries <= channels, entries, 1)
    sign = 2.0 * draw.integers(0, 2, batch, length, channels) - 1.0
    rows = torch.where(order < entries, sign, 0.0)
    again = draw.integers(0, max(length, 1), batch, length)  # a quarter are copies of others
    copies = rows.gather(1, again[..., None].expand_as(rows))
    rows = torch.where(draw.bools(batch, length, 1, p=0.25), copies, rows)
    return rows * 2.0 ** draw.integers(-3, 4, batch, length, 1)


def with_odd_rows(draw, features):
    """A row in ten holds NaN or an infinity somewhere, or zeros alone."""
    batch, length, channels = features.shape
    bad = torch.tensor([NAN, INF, -INF], device=draw.device, dtype=features.dtype)
    entry = bad[draw.integers(0, 3, batch, length, 1)]
    there = torch.arange(channels, device=draw.device) == channels // 2
    features = torch.where(draw.bools(batch, length, 1, p=0.1) & there, entry, features)
    return torch.where(draw.bools(batch, length, 1, p=0.1), torch.zeros_like(features), features)


def masks(draw, batch, length):
    return {
        "candidates": draw.bools(batch, length, p=0.8),
        "keep": draw.bools(batch, length, p=0.1) & draw.bools(batch, 1, p=0.7),
    }


# --- every pick ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_maxmin_takes_the_first_of_the_farthest(draw, backend, emulated, dtype):
    for length, channels in ((1, 5), (2, 16), (33, 20), (70, 160)):
        features = with_odd_rows(draw, signs(draw, 3, length, channels).to(dtype))
        steps = min(length, 12)
        check(features, steps, backend, slack=0)
        steps = steps if emulated else length
        check(features, steps, backend, slack=0, **masks(draw, 3, length))


def test_it_begins_with_the_row_that_is_given(draw, backend):
    features = signs(draw, 2, 30, 20)
    features[0, 7] = NAN  # which is odd, and so begins with the farthest
    for first in (0, 7, 29):
        check(features, 6, backend, slack=0, first=first)


@pytest.mark.parametrize("rule", RULES)
def test_random_cases_follow_the_formulas(draw, backend, emulated, rule):
    """500 of them with copies among their rows: a bound of 1e-5 holds float32 to its rounding."""
    for _ in range(1 if emulated else 25):
        batch, length, channels = 20, draw.integer(1, 40), draw.integer(24, 70)
        features = draw.normal(batch, length, channels)
        again = draw.integers(0, length, batch, length)
        copies = features.gather(1, again[..., None].expand_as(features))
        features = torch.where(draw.bools(batch, length, 1, p=0.3), copies, features)
        options = masks(draw, batch, length)
        if rule == "dpp":
            options["relevance"] = draw.integers(1, 6, batch, length) * draw.normal(batch, 1)
        check(features, min(length, 8), backend, slack=1e-5, rule=rule, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dpp_takes_each_direction_once(draw, backend, dtype):
    """Rows along axes: the most relevant of each, the first of equals, until none is left."""
    batch, length, axes = 4, 50, 9
    axis = draw.integers(0, axes, batch, length)
    sizes = 2.0 ** draw.integers(-4, 5, batch, length) * (2.0 * draw.bools(batch, length) - 1.0)
    features = torch.nn.functional.one_hot(axis, 12) * sizes[..., None]
    relevance = draw.integers(-3, 4, batch, length).float()
    keep = draw.bools(batch, length, p=0.04)
    for k in (1, 4, length):
        selection = vtp.select_diverse(
            features.to(dtype), k, rule="dpp", relevance=relevance, keep=keep, backend=backend
        )
        for b in range(batch):
            taken, rows = {axis[b, i].item() for i in range(length) if keep[b, i]}, []
            ranked = sorted(range(length), key=lambda i: (-relevance[b, i].abs().item(), i))
            for i in ranked:
                new = axis[b, i].item() not in taken and relevance[b, i] != 0
                if len(rows) < k and new and not keep[b, i]:
                    rows.append(i)
                    taken.add(axis[b, i].item())
            want = sorted(rows + keep[b].nonzero()[:, 0].tolist())
            assert selection.indices[b, : selection.counts[b]].tolist() == want


def test_dpp_stops_where_nothing_is_left(draw, backend):
    """No more rows than dimensions, odd ones never, and of combinations of two none."""
    features = draw.normal(2, 40, 5)
    features[1, 3:] = features[1, :1] * draw.normal(37, 1) + features[1, 1:2] * draw.normal(37, 1)
    features[:, 2] = NAN
    selection = vtp.select_diverse(features, 30, rule="dpp", backend=backend)
    assert selection.counts.tolist() == [5, 2]
    assert not (selection.indices == 2).any()
    selection = vtp.select_diverse(features[:, :3], 3, rule="dpp", backend=backend)
    assert selection.indices.tolist() == [[0, 1, -1]] * 2


def test_dpp_weighs_any_relevance(draw, backend):
    """Of any size: their squares need not be floats."""
    features = torch.eye(6, device=draw.device)[None]
    relevance = torch.tensor([[1e-30, 1e30, -3e38, 0.0, 2e-38, 1e-42]], device=draw.device)
    orders = in_order(features, 6, backend, rule="dpp", relevance=relevance)
    assert orders == [[2, 1, 0, 4, 5]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("rule", RULES)
def test_no_finite_row_is_too_large_or_too_small(draw, backend, rule, dtype):
    """Rows may be scaled by powers of two: same choice, as long as no bit is lost to subnormals."""
    features = draw.normal(2, 40, 24).to(torch.bfloat16).to(dtype)
    want = vtp.select_diverse(features, 10, rule=rule, backend=backend)
    largest = {torch.float64: 1000, torch.float32: 120, torch.bfloat16: 100}[dtype]
    for exponents in (draw.integers(-largest, largest, 2, 40, 1), largest, -largest):
        scaled = torch.ldexp(features.double(), torch.as_tensor(exponents, device=draw.device))
        got = vtp.select_diverse(scaled.to(dtype), 10, rule=rule, backend=backend)
        assert scaled.to(dtype).isfinite().all() and torch.equal(got.indices, want.indices)


# --- what does not compete, and what does not fit ------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_do_not_compete_are_not_read(draw, backend, rule):
    features = signs(draw, 3, 40, 20)
    candidates = draw.bools(3, 40, p=0.6)
    options = {"rule": rule, "candidates": candidates, "backend": backend}
    if rule == "dpp":
        relevance = 2.0 ** draw.integers(-3, 3, 3, 40)
        options["relevance"] = relevance.masked_fill(~candidates, NAN)
    other = features.masked_fill(~candidates[..., None], NAN)
    want = vtp.select_diverse(features, 9, **options)
    assert torch.equal(vtp.select_diverse(other, 9, **options).indices, want.indices)
    assert candidates.gather(1, want.indices.clamp(min=0))[want.indices >= 0].all()


@pytest.mark.parametrize("rule", RULES)
def test_kept_rows_come_first_where_there_is_no_room(draw, backend, rule):
    features = torch.eye(8, device=draw.device)[None]
    keep = torch.zeros(1, 8, dtype=torch.bool, device=draw.device)
    keep[0, [1, 4, 6]] = True
    for capacity, row in ((0, []), (2, [1, 4]), (3, [1, 4, 6]), (4, [0, 1, 4, 6]), (9, None)):
        selection = vtp.select_diverse(
            features, 3, rule=rule, keep=keep, capacity=capacity, backend=backend
        )
        row = row if row is not None else [0, 1, 2, 3, 4, 6]
        assert selection.indices.tolist() == [row + [-1] * (capacity - len(row))]
        assert selection.counts.tolist() == [len(row)]
    for capacity in (0, 1, 2, 3):  # nothing competes, and what is kept has no room
        selection = vtp.select_diverse(
            features, 3, rule=rule, keep=keep, candidates=keep, capacity=capacity, backend=backend
        )
        assert selection.indices.tolist() == [keep[0].nonzero()[:capacity, 0].tolist()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_k_per_row(draw, backend, rule, dtype):
    features = signs(draw, 6, 30, 40)
    k = torch.tensor([-2, 0, 1, 7, 30, 99], dtype=dtype, device=draw.device)
    got = vtp.select_diverse(features, k, rule=rule, capacity=12, backend=backend)
    for b, count in enumerate((0, 0, 1, 7, 12, 12)):
        row = slice(b, b + 1)
        want = vtp.select_diverse(features[row], count, rule=rule, capacity=12, backend=backend)
        assert torch.equal(got.indices[row], want.indices)
        assert got.counts[b] == want.counts[0] == count


@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_choose_from(draw, backend, rule):
    options = {"rule": rule, "backend": backend}
    features = draw.normal(2, 5, 4)
    none = torch.zeros(2, 5, dtype=torch.bool, device=draw.device)
    for selection, shape in (
        (vtp.select_diverse(features[:0], 3, **options), (0, 3)),
        (vtp.select_diverse(features[:, :0], 0, **options), (2, 0)),
        (vtp.select_diverse(features[:, :0], 0, capacity=2, **options), (2, 2)),
        (vtp.select_diverse(features, 0, **options), (2, 0)),
    ):
        assert selection.indices.shape == shape and (selection.indices == -1).all()
        assert selection.counts.tolist() == [0] * shape[0]
    none[1, 3] = True
    selection = vtp.select_diverse(features, 2, candidates=none, **options)
    assert selection.indices.tolist() == [[-1, -1], [3, -1]]


# --- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_row_alone_chooses_as_in_its_batch(draw, backend, rule):
    features = draw.normal(5, 100, 70)
    features[1:3, 50:] = NAN  # shorter rows
    options = {"rule": rule, "backend": backend}
    together = vtp.select_diverse(features, 30, **options)
    for b in range(5):
        alone = vtp.select_diverse(features[b : b + 1], 30, **options)
        assert torch.equal(alone.indices, together.indices[b : b + 1])
    again = vtp.select_diverse(features, 30, **options)
    assert torch.equal(again.indices, together.indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_as_far_from_each_other_as_from_themselves(draw, backend, dtype):
    """Of rows that are equal the first is chosen; once all others are copies, the first of all."""
    distinct = draw.normal(1, 30, 70)
    copy_of = draw.integers(0, 30, 50)
    features = torch.cat((distinct, distinct[:, copy_of] * 2.0 ** draw.integers(-2, 3, 50, 1)), 1)
    features = features[:, torch.randperm(80, generator=draw.generator)].to(dtype)
    same = torch.nn.functional.normalize(features[0].double(), dim=1)
    same = torch.isclose(same @ same.T, torch.ones((), dtype=torch.float64, device=draw.device))
    firsts = [i for i in range(80) if not same[i, :i].any()]
    others = [i for i in range(80) if i not in firsts]
    selection = vtp.select_diverse(features, len(firsts) + 3, backend=backend, first=firsts[3])
    assert selection.indices.tolist() == [sorted(firsts + others[:3])]
    selection = vtp.select_diverse(features, 80, backend=backend, rule="dpp")
    assert selection.indices[0, : selection.counts[0]].tolist() == firsts


@pytest.mark.parametrize("rule", RULES)
def test_few_steps_choose_as_the_first_of_many(draw, backend, rule):
    """Whether all pairs are multiplied before the steps, or each step multiplies its own."""
    features = draw.normal(1, 100, 33)
    first = 7 if rule == "maxmin" else "farthest"
    (order,) = in_order(features, 30, backend, rule=rule, first=first)
    assert len(order) == 30


def test_strides(draw, backend):
    wide = signs(draw, 4, 61, 80)
    mask = draw.bools(4, 61, p=0.7)
    relevance = 2.0 ** draw.integers(-3, 3, 4, 61)
    for view in (
        (slice(None), slice(1, None), slice(1, None)),
        (slice(None, None, 2), slice(None, None, 3), slice(3, 50)),
        (slice(None), slice(None), slice(None, None, 2)),
    ):
        features, candidates, weights = wide[view], mask[view[:2]], relevance[view[:2]]
        for options in ({"rule": "dpp", "relevance": weights}, {"rule": "maxmin"}):
            got, want = (
                vtp.select_diverse(x, 9, candidates=y, **options, backend=backend)
                for x, y in ((features, candidates), (features.clone(), candidates.clone()))
            )
            assert torch.equal(got.indices, want.indices)
    turned = wide.transpose(1, 2).contiguous().transpose(1, 2)
    got = vtp.select_diverse(turned, 9, backend=backend)
    assert torch.equal(got.indices, vtp.select_diverse(wide, 9, backend=backend).indices)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_more_rows_than_pairs_are_kept_for():
    """17,000 rows along one axis, but for two: native code keeps no matrix of that size."""
    features = torch.zeros(1, 17000, 3)
    features[..., 0] = 1.0
    features[0, 9] = torch.tensor([-2.0, 0.0, 0.0])
    features[0, 16999] = torch.tensor([0.0, 0.5, 0.0])
    for k, rows in ((1, [9]), (2, [0, 9]), (3, [0, 9, 16999]), (4, [0, 1, 9, 16999])):
        selection = vtp.select_diverse(features, k, backend="native")
        assert selection.indices.tolist() == [rows]
    selection = vtp.select_diverse(features, 5, rule="dpp", backend="native")
    assert selection.indices.tolist() == [[0, 16999, -1, -1, -1]]


# --- native code that looks at few cosines ------------------------------------------------------
#
# So it does for 256 channels and more, where no more than a quarter of the rows are chosen or kept:
# with 70 rows the later of 20 steps are done from all pairs.


def one_channel_for_all(draw, batch, length, channels):
    """Rows that differ in the smallest of entries alone: rounded to 7 bits all are one."""
    features = 2.0**-10 * signs(draw, batch, length, channels)
    return features.index_fill(2, torch.tensor([3]), 64.0)


def nearly_one_row(draw, batch, length, channels):
    return draw.normal(batch, 1, channels) + 1e-7 * draw.normal(batch, length, channels)


def in_clusters(draw, batch, length, channels):
    cluster = draw.integers(0, 5, batch, length, 1).expand(-1, -1, channels)
    centres = 8.0 * draw.normal(batch, 5, channels)
    return centres.gather(1, cluster) + draw.normal(batch, length, channels)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("channels", (256, 272))
def test_few_cosines_tell_the_first_of_the_farthest(draw, dtype, channels):
    for features in (
        signs(draw, 2, 70, channels),
        with_odd_rows(draw, signs(draw, 2, 70, channels)),
        torch.ones(2, 70, channels),
        torch.zeros(2, 70, channels),
    ):
        features = features.to(dtype)
        check(features, 20, "native", slack=0)
        check(features, 20, "native", slack=0, **masks(draw, 2, 70))
    check(features, 8, "native", slack=0, first=33)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("weigh", ("all", "some", "spread"))
def test_few_cosines_tell_the_largest_gain(draw, dtype, weigh):
    """Where all rows matter alike most of them are conditioned, where few do only those."""
    relevance = {
        "all": torch.ones(3, 120),
        "some": draw.integers(0, 4, 3, 120).float(),
        "spread": draw.normal(3, 120).mul(5.0).exp(),
    }[weigh]
    distinct = draw.normal(3, 120, 256)
    again = draw.integers(0, 120, 3, 120, 1).expand_as(distinct)
    features = torch.where(draw.bools(3, 120, 1, p=0.3), distinct.gather(1, again), distinct)
    features = with_odd_rows(draw, features).to(dtype)
    for options in ({}, masks(draw, 3, 120)):
        check(features, 8, "native", slack=1e-5, rule="dpp", relevance=relevance, **options)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_few_cosines_tell_when_nothing_is_left(draw, dtype):
    """Rows along axes, kept ones too: the most relevant of each axis, the first of equals."""
    axis = draw.integers(0, 9, 2, 120)
    features = torch.nn.functional.one_hot(axis, 256) * 2.0 ** draw.integers(-3, 4, 2, 120, 1)
    relevance = draw.integers(0, 5, 2, 120)
    keep = torch.zeros(2, 120, dtype=torch.bool).index_fill(1, torch.tensor([5, 60]), True)
    options = {"rule": "dpp", "relevance": relevance.float(), "keep": keep, "backend": "native"}
    selection = vtp.select_diverse(features.to(dtype), 25, **options)
    for b in range(2):
        best = {}
        taken = axis[b, [5, 60]].tolist()
        for i in range(120):
            along, most = int(axis[b, i]), best.get(int(axis[b, i]), (0, -1))[0]
            if along not in taken and relevance[b, i] > most:
                best[along] = (int(relevance[b, i]), i)
        expected = sorted([5, 60, *(i for _, i in best.values())])
        assert selection.indices[b, : selection.counts[b]].tolist() == expected


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("rule", RULES)
def test_few_cosines_are_the_same_in_any_batch_and_with_any_threads(draw, rule):
    features = with_odd_rows(draw, draw.normal(3, 150, 512))
    together = vtp.select_diverse(features, 30, rule=rule, backend="native").indices
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for b in range(3):
                alone = vtp.select_diverse(features[b : b + 1], 30, rule=rule, backend="native")
                assert torch.equal(alone.indices[0], together[b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("rule", RULES)
def test_whether_few_are_looked_at_is_no_matter_of_other_rows(draw, rule):
    """What others want must not decide it: of rows that tie but for rounding others would stay."""
    keep = torch.zeros(2, 70, dtype=torch.bool).index_fill(1, torch.tensor([3]), True)
    given = ({"capacity": 70, "keep": keep}, {"capacity": 10})
    every = itertools.product(given, ((1, 16), (60, 2), (60, 17), (2, 60)), range(4))
    for options, wanted, _ in every:
        if rule == "maxmin":  # a row and the same turned by 1, 2, ... channels
            row = draw.normal(2, 256)
            features = torch.stack([row.roll(i, 1) for i in range(70)], 1)
        else:  # 35 rows, each twice, of other lengths
            features = draw.normal(2, 35, 256).repeat(1, 2, 1) * (0.5 + draw.uniform(2, 70, 1))
        k = torch.tensor(wanted)
        together = vtp.select_diverse(features, k, rule=rule, backend="native", **options)
        for b in range(2):
            own = {n: x[b : b + 1] if n == "keep" else x for n, x in options.items()}
            alone = vtp.select_diverse(
                features[b : b + 1], k[b : b + 1], rule=rule, backend="native", **own
            )
            assert torch.equal(alone.indices[0], together.indices[b])


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("rows", (one_channel_for_all, nearly_one_row, in_clusters))
def test_few_cosines_tell_where_coarse_ones_do_not(draw, rows):
    """Every row that is chosen is one of the farthest in its turn, but for rounding."""
    features = rows(draw, 1, 70, 256)
    keep = draw.bools(1, 70, p=0.05)
    for k, scale in ((2, 1.0), (9, 1.0), (14, 1.0), (20, 1.0), (4, 2.0**20)):  # not scaled, scaled
        for kept in (torch.zeros_like(keep), keep):
            selection = vtp.select_diverse(scale * features, k, keep=kept, backend="native")
            left = set(selection.indices[0, : selection.counts[0]].tolist())
            chosen = kept[0].nonzero()[:, 0].tolist()
            left -= set(chosen)
            assert len(left) == k
            while left:
                others = [i for i in range(70) if i not in chosen]
                scores = divprune_scores(cosines(features[0]), chosen, others)
                pick = max(left, key=scores.get)
                assert scores[pick] >= max(scores.values()) - 2e-6
                chosen.append(pick)
                left.remove(pick)


# --- bad input ----------------------------------------------------------------------------------

FEATURES, MASK, ONES = torch.ones(2, 9, 4), torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9)
DPP = {"rule": "dpp"}


def but(x, value, *at):
    x = x.clone()
    x[at] = value
    return x


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": [[[1.0]]]}, TypeError, "features must be a tensor .* got list"),
        ({"features": ONES}, ValueError, r"features must have shape \[B, N, C\].* got \[2, 9\]"),
        ({"features": FEATURES.int()}, TypeError, "features must be .*int32"),
        ({"features": FEATURES[..., :0]}, ValueError, "features must have at least 1 channel"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 10}, ValueError, "k must be at most N = 9, got 10"),
        ({"k": 1.5}, TypeError, "k must be an int, got float"),
        ({"k": torch.tensor([1, 2])}, ValueError, "capacity must be given when k is a tensor"),
        ({"k": torch.tensor([1]), "capacity": 3}, ValueError, r"k must have shape \[B\]"),
        ({"capacity": -1}, ValueError, "capacity must be at least 0"),
        ({"rule": "best"}, ValueError, r"rule must be one of \('maxmin', 'dpp'\), got 'best'"),
        ({"candidates": MASK[:, :8]}, ValueError, r"candidates must have shape .*\[2, 8\]"),
        (
            {"candidates": torch.zeros_like(MASK)},
            ValueError,
            "candidates must name some, for k is 3; no row of the batch has any",
        ),
        ({"candidates": MASK.int()}, TypeError, "candidates must be bool, got int32"),
        ({"keep": MASK[:1]}, ValueError, r"keep must have shape .*\[1, 9\]"),
        ({"relevance": ONES}, ValueError, "relevance is for rule 'dpp', got one with .*'maxmin'"),
        ({**DPP, "relevance": ONES[:1]}, ValueError, r"relevance must have shape .*\[1, 9\]"),
        ({**DPP, "relevance": ONES.int()}, TypeError, "relevance must be .*int32"),
        ({**DPP, "relevance": ONES.to("meta")}, ValueError, "relevance must be on cpu, got meta"),
        (
            {**DPP, "relevance": but(ONES, NAN, 1, 3)},
            ValueError,
            r"relevance must be finite .* got nan at \[1, 3\]",
        ),
        (
            {**DPP, "relevance": but(ONES.double(), 1e39, 0, 8)},
            ValueError,
            r"relevance must be finite in torch.float32 .* got 1e\+39 at \[0, 8\]",
        ),
        ({**DPP, "first": 3}, ValueError, "first is for rule 'maxmin', got 3 with rule 'dpp'"),
        ({"first": "nearest"}, ValueError, "first must be 'farthest' or an index, got 'nearest'"),
        ({"first": True}, TypeError, "first must be an int, got bool"),
        ({"first": -1}, ValueError, "first must be at least 0, got -1"),
        ({"first": 9}, ValueError, "first must be less than N = 9, got 9"),
        (
            {"first": 4, "candidates": but(MASK, False, 1, 4)},
            ValueError,
            "first must be a candidate of every row .* got 4, which row 1 has not",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
        ({"backend": "triton"}, NotImplementedError, "'triton' cannot .* no Triton kernel for it"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"features": FEATURES, "k": 3, **change}
    with pytest.raises(error, match=message):
        vtp.select_diverse(**arguments)


def test_first_need_not_be_a_candidate_where_it_is_not_asked_for():
    """A row that keeps something, or has no candidates, begins with nothing."""
    features = FEATURES.clone()
    candidates, keep = MASK.clone(), torch.zeros_like(MASK)
    candidates[0] = False
    candidates[1, 4], keep[1, 2] = False, True
    selection = vtp.select_diverse(features, 2, first=4, candidates=candidates, keep=keep)
    assert selection.counts.tolist() == [0, 3]
