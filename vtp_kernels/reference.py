"""Every op in a few lines of PyTorch: the truth that all other backends are tested against.

Written to be read, not to be fast. Works on any device, computes scores in float32 (in float64 when
the inputs are float64) and is traceable by torch.compile. Arguments are those of the public ops in
`vtp_kernels.ops`, which check them first; here they are taken as valid.

Rules that hold for all ops:

* Tokens are ranked by (score descending, index ascending). NaN ranks below -inf; -0.0 equals +0.0.
* Indices come back ascending, padded with -1.
* Padded keys (`valid` False) never reach a result, whatever bits they hold.
* A mask is True in every byte that is not 0, as for torch (`uint8.view(torch.bool)`).
* Query head h reads key/value head `h // (Hq // Hkv)`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtp_kernels.selection import Selection

__all__ = [
    "assign_rows",
    "attention_scores",
    "attention_topk",
    "cls_inflection",
    "compact_kv",
    "compact_rows",
    "inflection",
    "merge_rows",
    "passive_attention",
    "select_diverse",
    "select_topk",
    "token_contribution",
]


def _wide(x: Tensor) -> Tensor:
    """The dtype scores are computed in: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def _truth(mask: Tensor | None) -> Tensor | None:
    """The mask in bytes of 0 and 1: what torch makes of others may differ from op to op."""
    return None if mask is None else mask.view(torch.uint8) != 0


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return _wide(x).repeat_interleave(heads // x.shape[1], dim=1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # TF32, which many programs switch on for the whole process, would round float32 to 10 bits.
    if a.dtype == torch.float32 and a.is_cuda:
        return (a.double() @ b.double()).float()
    return a @ b


def _logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """[B, Hq, M, S] from query [B, Hq, M, D] and key [B, Hkv, S, D]."""
    heads, dim = query.shape[1], query.shape[3]
    scale = dim**-0.5 if scale is None else scale
    return scale * _matmul(_wide(query), _repeat_heads(key, heads).transpose(2, 3))


def _softmax(logits: Tensor, attended: Tensor) -> Tensor:
    """Softmax over the attended keys; 0 elsewhere and in rows that attend to nothing."""
    weights = torch.softmax(logits.masked_fill(~attended, -math.inf), dim=-1)
    return weights.masked_fill(~attended, 0.0)


# --- scores -----------------------------------------------------------------------------------


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_valid: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    support: str = "all",
    head_reduce: str = "mean",
) -> Tensor:
    batch, _, rows, _ = query.shape
    length = key.shape[2]
    candidates, valid, query_valid = _truth(candidates), _truth(valid), _truth(query_valid)
    logits = _logits(query, key, scale)

    attended = torch.ones(batch, 1, rows, length, dtype=torch.bool, device=query.device)
    if valid is not None:
        attended = attended & valid[:, None, None, :]
    if query_positions is not None:
        position = torch.arange(length, device=query.device)
        attended = attended & (position <= query_positions[:, None, :, None])
    if support == "candidates":
        attended = attended & candidates[:, None, None, :]

    if lse is None:
        weights = _softmax(logits, attended)
    else:  # lse = -inf marks a row that attends to nothing: weight 0, where exp would give inf
        lse = lse.to(logits.dtype)[..., None]
        weights = torch.exp(logits - lse).masked_fill(~attended | (lse == -math.inf), 0.0)

    # The mean counts every valid row, also one that attends to nothing.
    if query_valid is None:
        per_head = weights.sum(2) / max(rows, 1)
    else:
        row_valid = query_valid[:, None, :, None]
        per_head = weights.masked_fill(~row_valid, 0.0).sum(2) / row_valid.sum(2).clamp(min=1)
    if head_reduce == "mean":
        scores = per_head.mean(1)
    elif head_reduce == "max":
        scores = per_head.amax(1)
    else:
        scores = per_head.sum(1)
    return scores.masked_fill(~candidates, 0.0)


def token_contribution(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    candidates, valid = _truth(candidates), _truth(valid)
    attended = torch.ones_like(candidates) if valid is None else valid
    weights = _softmax(_logits(query[:, :, None], key, scale)[:, :, 0], attended[:, None, :])
    value = _repeat_heads(value, query.shape[1]).masked_fill(~attended[:, None, :, None], 0.0)

    contribution = (weights[..., None] * value).transpose(1, 2).flatten(2)  # c: [B, S, Hq * D]
    output = contribution.sum(1, keepdim=True)  # o: [B, 1, Hq * D]
    rest = output - contribution
    norm = contribution.norm(dim=-1)
    denominator = rest.norm(dim=-1) * output.norm(dim=-1)
    cosine = (rest * output).sum(-1) / denominator
    # A token that contributes nothing changes nothing: cosine 1. One that leaves nothing behind
    # (or an output that is zero to begin with) has no direction to compare: cosine 0.
    cosine = cosine.masked_fill(denominator == 0.0, 0.0).masked_fill(norm == 0.0, 1.0)
    return cosine.masked_fill(~candidates, 1.0), norm.masked_fill(~candidates, 0.0)


def passive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visual: Tensor,
    valid: Tensor | None = None,
    sink: str = "merge",
    visual_rows: str = "prefix",
    renormalize: bool = False,
    scale: float | None = None,
) -> Tensor:
    # A = ordinary causal softmax over the valid keys. With V the visual keys of a row:
    #
    #   text row, sink="drop"    A[t, V] = 0
    #   text row, sink="merge"   sum A[t, V] moves to the first visual key; the other A[t, V] = 0
    #   visual row, "prefix"     A[v, V] = 0, its own key included; earlier text of any kind stays
    #   visual row, "causal"     A as it is
    #   visual row, "skip"       output 0
    #
    # "First visual key" is the valid visual key of smallest index in the sequence, whichever image
    # it belongs to: every text row that sees visual keys at all sees that one.
    #
    # renormalize=False leaves A as edited, so a row may sum to less than 1: dropped keys stay in
    # the softmax denominator. renormalize=True takes the softmax over the keys that remain. Under
    # "merge" the first visual key remains, with its own logit: no other visual key is read at all.
    #
    # Rows of padding, and rows with no key left, output 0.
    length = query.shape[2]
    visual, valid = _truth(visual), _truth(valid)
    valid = torch.ones_like(visual) if valid is None else valid
    visual = visual & valid
    is_first = visual & (visual.cumsum(1) == 1)

    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    attended = causal & valid[:, None, :] & valid[:, :, None]  # [B, S, S], query rows first
    text_row, visual_row = ~visual[:, :, None], visual[:, :, None]
    visual_key = visual[:, None, :]
    removed = (text_row & visual_key).expand_as(attended)
    if visual_rows == "prefix":
        removed = removed | (visual_row & visual_key)
    elif visual_rows == "skip":
        removed = removed | visual_row
    merged = text_row & is_first[:, None, :] & attended & (sink == "merge")

    logits = _logits(query, key, scale)
    if renormalize:
        weights = _softmax(logits, (attended & (merged | ~removed))[:, None])
    else:
        full = _softmax(logits, attended[:, None])
        visual_mass = full.masked_fill(~visual_key[:, None], 0.0).sum(-1, keepdim=True)
        weights = full.masked_fill(removed[:, None], 0.0) + visual_mass * merged[:, None]
    value = _repeat_heads(value, query.shape[1]).masked_fill(~valid[:, None, :, None], 0.0)
    return _matmul(weights, value).to(query.dtype)


# --- selection --------------------------------------------------------------------------------


def _rank(scores: Tensor, group: Tensor | None = None) -> Tensor:
    """Indices in rank order: (group ascending, NaN last, score descending, index ascending)."""
    is_nan = scores.isnan()
    order = torch.sort(scores.masked_fill(is_nan, -math.inf), dim=1, descending=True, stable=True)[
        1
    ]
    last = is_nan.int() if group is None else 2 * group + is_nan.int()
    return order.gather(1, torch.sort(last.gather(1, order), dim=1, stable=True)[1])


def _first(order: Tensor, counts: Tensor, capacity: int) -> Selection:
    """The first `counts` entries of a rank order, ascending, in `capacity` columns."""
    length = order.shape[1]
    past = torch.arange(length, device=order.device) >= counts[:, None]
    indices = order.masked_fill(past, length).sort(dim=1)[0][:, :capacity]
    indices = indices.masked_fill(indices == length, -1)
    indices = torch.nn.functional.pad(indices, (0, capacity - indices.shape[1]), value=-1)
    return Selection(indices, counts.int())


def select_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    candidates: Tensor | None = None,
    keep: Tensor | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
) -> Selection:
    length = scores.shape[1]
    if capacity is None:
        capacity = length if keep is not None else min(k, length)
    candidates, keep = _truth(candidates), _truth(keep)
    keep = torch.zeros_like(scores, dtype=torch.bool) if keep is None else keep
    competing = ~keep if candidates is None else candidates & ~keep
    if threshold is not None:
        competing = competing & (_wide(scores) > threshold)  # False for NaN

    # Kept rows first: they are what survives when the row needs more than its capacity.
    group = torch.where(keep, 0, torch.where(competing, 1, 2))
    k = torch.as_tensor(k, device=scores.device).clamp(min=0)
    counts = (keep.sum(1) + torch.minimum(competing.sum(1), k)).clamp(max=capacity)
    return _first(_rank(scores, group), counts, capacity)


def attention_topk(
    query: Tensor,
    key: Tensor,
    k: int | Tensor,
    *,
    candidates: Tensor,
    valid: Tensor | None = None,
    query_positions: Tensor | None = None,
    query_valid: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    support: str = "all",
    head_reduce: str = "mean",
    keep: Tensor | None = None,
    threshold: float | None = None,
    capacity: int | None = None,
) -> tuple[Selection, Tensor]:
    scores = attention_scores(
        query,
        key,
        candidates=candidates,
        valid=valid,
        query_positions=query_positions,
        query_valid=query_valid,
        lse=lse,
        scale=scale,
        support=support,
        head_reduce=head_reduce,
    )
    selection = select_topk(
        scores, k, candidates=candidates, keep=keep, threshold=threshold, capacity=capacity
    )
    return selection, scores


# --- diverse selection ------------------------------------------------------------------------

#: dpp: a row is a combination of those chosen, but for rounding, once no more than this share of
#: its own square is left.
NOTHING_LEFT = 1e-5


def competing(candidates: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor:
    """bool [B, N]: the rows of `like` [B, N, ...] that may be chosen."""
    rows = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if candidates is not None:
        rows = rows & _truth(candidates)
    return rows if keep is None else rows & ~_truth(keep)


def _settled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 as it is compared: in float32 or, for float64 features, to 13 digits. What would be
    equal but for the order of a sum is equal then."""
    return (x * 2.0**44).round() * 2.0**-44 if dtype == torch.float64 else x.float()


def _cosines(features: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine [B, N, N], finite [B, N]): what is not finite counts as zeros, of cosine 0."""
    finite = features.isfinite().all(-1)
    x = features.double().masked_fill(~finite[..., None], 0.0)
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=tiny)  # so that no square of float64 overflows
    dots = x @ x.mT
    squares = dots.diagonal(dim1=1, dim2=2)
    norms = (squares[:, :, None] * squares[:, None]).sqrt()
    return _settled((dots / norms).masked_fill(norms == 0.0, 0.0), features.dtype), finite


def _maxmin(cosine: Tensor, open_: Tensor, anchors: Tensor, first: str | int, steps: int) -> Tensor:
    """int64 [B, N]: the step in which an open row is chosen, N for all others."""
    length = cosine.shape[1]
    i = torch.arange(length, device=cosine.device)
    distance = 1.0 - cosine
    nearest = distance.masked_fill(~anchors[:, None], math.inf).amin(-1)
    # To begin with: the distance to the nearest other candidate, or whatever lets `first` win.
    score = distance.masked_fill(~open_[:, None] | (i == i[:, None]), math.inf).amin(-1)
    if first != "farthest":
        score = score.masked_fill(i == first, math.inf)  # which no other has, unless it is alone
    score = torch.where(anchors.any(1, keepdim=True), nearest, score)
    order = torch.full_like(open_, length, dtype=torch.int64)
    for step in range(steps):
        pick = score.masked_fill(~open_, -math.inf).argmax(1, keepdim=True)  # the first of equals
        chosen = open_ & (i == pick)
        order = order.masked_fill(chosen, step)
        open_ = open_ & ~chosen
        row = distance.gather(1, pick[..., None].expand(-1, -1, length))[:, 0]
        score = nearest = torch.minimum(nearest, row)
    return order


def _dpp(cosine: Tensor, weight: Tensor, open_: Tensor, kept: Tensor | None, steps: int) -> Tensor:
    """As _maxmin. With r drawn out of it, every row of the Cholesky factor is that of S: a step
    divides by what is left of the chosen row, and `left` is d / r^2, 1 to begin with."""
    dtype, cosine, length = cosine.dtype, cosine.double(), cosine.shape[1]
    i = torch.arange(length, device=cosine.device)
    left = cosine.diagonal(dim1=1, dim2=2)  # 1, or 0 of a row of zeros
    factor = cosine[:, :0]  # [B, rows so far, N]

    def condition(row: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`left` and `factor` with the row of index `row` [B, 1] chosen, where it counts."""
        pivot = left.gather(1, row).sqrt()
        index = row[..., None]
        known = (factor * factor.gather(2, index.expand(-1, factor.shape[1], -1))).sum(1)
        rest = (cosine.gather(1, index.expand(-1, -1, length))[:, 0] - known) / pivot
        rest = rest.masked_fill(~counts, 0.0)
        return left - rest * rest, torch.cat((factor, rest[:, None]), dim=1)

    for j in range(length if kept is not None else 0):
        counts = kept[:, j : j + 1] & (_settled(left, dtype)[:, j : j + 1] > NOTHING_LEFT)
        left, factor = condition(i[j].expand_as(counts), counts)
    order = torch.full_like(open_, length, dtype=torch.int64)
    for step in range(steps):
        share = _settled(left, dtype)
        competes = open_ & (share > NOTHING_LEFT) & (weight > 0.0)
        gain = (weight * share.sqrt()).masked_fill(~competes, -1.0)
        pick = gain.argmax(1, keepdim=True)
        chosen = competes & (i == pick)
        order = order.masked_fill(chosen, step)
        open_ = open_ & ~chosen
        left, factor = condition(pick, chosen.any(1, keepdim=True))
    return order


def select_diverse(
    features: Tensor,
    k: int | Tensor,
    *,
    rule: str = "maxmin",
    relevance: Tensor | None = None,
    candidates: Tensor | None = None,
    keep: Tensor | None = None,
    first: str | int = "farthest",
    capacity: int | None = None,
) -> Selection:
    batch, length, _ = features.shape
    if capacity is None:
        capacity = length if keep is not None else min(k, length)
    if length == 0:
        return Selection(
            torch.full((batch, capacity), -1, device=features.device),
            torch.zeros(batch, dtype=torch.int32, device=features.device),
        )
    competes = competing(candidates, keep, features)
    kept = torch.zeros_like(competes) if keep is None else _truth(keep)
    steps = min(capacity, length) if isinstance(k, Tensor) else min(k, capacity, length)
    cosine, finite = _cosines(features)
    if rule == "maxmin":
        order = _maxmin(cosine, competes & finite, kept & finite, first, steps)
        can_be_taken = competes.sum(1)  # what is not finite too, at last
    else:
        weight = torch.ones_like(cosine[:, 0]) if relevance is None else _wide(relevance).abs()
        open_ = competes & finite & weight.isfinite()
        order = _dpp(cosine, weight, open_, None if keep is None else kept & finite, steps)
        can_be_taken = (order < length).sum(1)
    # Kept rows first: they are what survives when the row needs more than its capacity.
    place = torch.where(kept, -1, torch.where(competes, order, length + 1))
    k = torch.as_tensor(k, device=features.device).clamp(min=0)
    counts = (kept.sum(1) + torch.minimum(can_be_taken, k)).clamp(max=capacity)
    return _first(place.sort(dim=1, stable=True)[1], counts, capacity)


# --- inflection -------------------------------------------------------------------------------
#
# The curve is converted to float64 and sorted by rank. Sorted, a row reads
#
#     [+inf ...][finite scores, descending: y_0 ... y_{n-1}][-inf ...][NaN ...]
#
# and the knee is sought on the finite run alone. A knee at y_t keeps everything up to and including
# y_t, so all +inf scores as well. "No knee" keeps the whole row, N tokens. The count is then raised
# to min_keep, and cut to the capacity min(max_keep, N). All arithmetic is float64, one rounding per
# operation in the order written (no fused multiply-add), so that backends agree on every bit.
#
# There is no knee when n < 3 or the run is flat, y_0 == y_{n-1}, whatever the rule. "chord" and
# "kneedle" see the run clipped to its own quantile, min(y_i, quantile(clip_quantile)); that is the
# run which must not be flat. The other two do not look at the shape of the curve, so sinks
# do not mislead them, and nothing is clipped: that would hide the very outliers "iqr" looks for.


def _quantile(y: Tensor, n: Tensor, q: float) -> Tensor:
    """NumPy's "linear" quantile of the descending run y_0 ... y_{n-1}, with NumPy's rounding.

    On the ascending run a_0 ... a_{n-1}: p = (n - 1) * q, i = floor(p), t = p - i,
    d = a_{i+1} - a_i; a_i + d * t where t < 0.5, else a_{i+1} - d * (1 - t), i + 1 at most n - 1.
    """
    last = (n - 1).clamp(min=0)
    position = last.double() * q
    below = position.floor()
    t = position - below
    low = y.gather(1, last - below.long())
    high = y.gather(1, (last - below.long() - 1).clamp(min=0))
    step = high - low
    return torch.where(t < 0.5, low + step * t, high - step * (1.0 - t))


def _chord(y: Tensor, n: Tensor, dtype: torch.dtype) -> Tensor:
    """Point farthest below the chord through both ends; the first of equals.

    The distance below it, times the chord's length, is (y_0 - y_i) * (n - 1) - i * (y_0 - y_{n-1}).
    No knee when the curve is nowhere below its chord by more than scores of `dtype` are rounded:
    by epsilon * max(|y_0|, |y_{n-1}|), half an epsilon for y_i and half for the chord. float64 is
    also what distances are computed in, and takes eight.
    """
    last = (n - 1).clamp(min=0)
    i = torch.arange(y.shape[1], device=y.device)
    drop = y[:, :1] - y
    distance = drop * last.double() - i.double() * drop.gather(1, last)
    epsilon = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    noise = epsilon * torch.maximum(y[:, :1].abs(), y.gather(1, last).abs()) * last.double()
    below = (distance > noise) & (i < n)
    farthest = distance.masked_fill(~below, 0.0).amax(1, keepdim=True)
    first = torch.where(below & (distance == farthest), i, y.shape[1]).amin(1, keepdim=True)
    return torch.where(below.any(1, keepdim=True), first, -1)


def _kneedle(y: Tensor, n: Tensor, sensitivity: float) -> Tensor:
    """First knee of the Kneedle algorithm (Satopaa et al. 2011) as the package `kneed` finds it.

    Difference curve d_i = (1 - (y_i - y_{n-1}) / (y_0 - y_{n-1})) - i / (n - 1). Local maxima and
    minima include plateaus and are compared with the neighbours that exist: i is a maximum if
    d_i >= both, a minimum if d_i <= both. Walk i = 0 ... n - 2. A maximum at i arms the search with
    the threshold d_i - S * (1 / (n - 1)); a minimum at i, even if i is a maximum too, disarms it.
    While armed, d_{i+1} < threshold makes the last maximum the knee.

    In place of 1 / (n - 1) kneed averages the rounded steps of x. The last bit of that shows only
    where the two best scores are equal: d_1 is then exactly one step below d_0.
    """
    last = (n - 1).clamp(min=1)
    i = torch.arange(y.shape[1], device=y.device)
    low = y.gather(1, (n - 1).clamp(min=0))
    x = i.double() / last.double()
    d = (1.0 - (y - low) / (y[:, :1] - low)) - x
    before = torch.cat((d[:, :1], d[:, :-1]), dim=1)
    after = torch.cat((d[:, 1:], d[:, -1:]), dim=1)
    last_max = torch.where((d >= before) & (d >= after), i, -1).cummax(1)[0]
    last_min = torch.where((d <= before) & (d <= after), i, -1).cummax(1)[0]
    threshold = d.gather(1, last_max.clamp(min=0)) - sensitivity * (1.0 / last.double())
    fires = (last_max > last_min) & (after < threshold) & (i < n - 1)
    first = torch.where(fires, i, y.shape[1]).amin(1, keepdim=True)
    knee = last_max.gather(1, first.clamp(max=y.shape[1] - 1))
    return torch.where(first < y.shape[1], knee, -1)


def _iqr(y: Tensor, n: Tensor) -> Tensor:
    """Last score above Q3 + 1.5 * (Q3 - Q1); no knee when none is."""
    q1, q3 = _quantile(y, n, 0.25), _quantile(y, n, 0.75)
    above = y > q3 + 1.5 * (q3 - q1)
    inside = torch.arange(y.shape[1], device=y.device) < n
    return (above & inside).sum(1, keepdim=True) - 1


def _mass(y: Tensor, n: Tensor, mass: float) -> Tensor:
    """First t with sum_{i <= t} max(y_i, 0) >= mass * sum of all, summed in rank order.

    A negative score weighs nothing. No knee when the total is 0.
    """
    i = torch.arange(y.shape[1], device=y.device)
    held = y.clamp(min=0.0).masked_fill(i >= n, 0.0).cumsum(1)
    total = held[:, -1:]
    first = torch.where(held >= mass * total, i, y.shape[1]).amin(1, keepdim=True)
    return torch.where(total > 0.0, first, -1)


def inflection(
    curve: Tensor,
    *,
    rule: str = "chord",
    min_keep: int = 1,
    max_keep: int | None = None,
    clip_quantile: float = 0.995,
    sensitivity: float = 1.0,
    mass: float = 0.9,
) -> Selection:
    batch, length = curve.shape
    capacity = length if max_keep is None else min(max_keep, length)
    if length == 0:
        return Selection(
            torch.empty(batch, 0, dtype=torch.int64, device=curve.device),
            torch.zeros(batch, dtype=torch.int32, device=curve.device),
        )
    order = _rank(curve)
    ranked = curve.double().gather(1, order)
    above = ranked.isposinf().sum(1, keepdim=True)  # +inf scores stand before the run
    n = ranked.isfinite().sum(1, keepdim=True)
    y = ranked.gather(1, (above + torch.arange(length, device=curve.device)).clamp(max=length - 1))

    if rule in ("chord", "kneedle") and clip_quantile < 1.0:
        y = torch.minimum(y, _quantile(y, n, clip_quantile))
    if rule == "chord":
        knee = _chord(y, n, curve.dtype)
    elif rule == "kneedle":
        knee = _kneedle(y, n, sensitivity)
    elif rule == "iqr":
        knee = _iqr(y, n)
    else:
        knee = _mass(y, n, mass)
    flat = ~(y[:, :1] > y.gather(1, (n - 1).clamp(min=0)))
    found = (n >= 3) & ~flat & (knee >= 0)
    counts = torch.where(found, above + knee + 1, length)[:, 0]
    return _first(order, counts.clamp(min=min_keep).clamp(max=capacity), capacity)


def cls_inflection(
    features: Tensor,
    cls: Tensor,
    *,
    rule: str = "chord",
    min_keep: int = 1,
    max_keep: int | None = None,
    clip_quantile: float = 0.995,
    sensitivity: float = 1.0,
    mass: float = 0.9,
) -> tuple[Selection, Tensor]:
    features, cls = _wide(features), _wide(cls)[:, None, :]
    norms = features.norm(dim=-1) * cls.norm(dim=-1)
    similarity = (features * cls).sum(-1) / norms
    similarity = similarity.masked_fill(norms == 0.0, 0.0)  # a zero vector is similar to nothing
    selection = inflection(
        similarity,
        rule=rule,
        min_keep=min_keep,
        max_keep=max_keep,
        clip_quantile=clip_quantile,
        sensitivity=sensitivity,
        mass=mass,
    )
    return selection, similarity


# --- compaction -------------------------------------------------------------------------------


def _gather(x: Tensor, dim: int, indices: Tensor, real: Tensor) -> Tensor:
    """Rows `indices` of x along `dim`, the last dimension of `indices`; 0 where not `real`."""
    trailing = x.shape[dim + 1 :]
    if x.shape[dim] == 0:
        return x.new_zeros(indices.shape + trailing)
    single = indices.shape + (1,) * len(trailing)
    index = indices.masked_fill(~real, 0).view(single).expand(indices.shape + trailing)
    return x.gather(dim, index).masked_fill(~real.view(single), 0)


def compact_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    slots = torch.arange(indices.shape[-1], device=indices.device)
    if counts is None:
        real = torch.ones_like(indices, dtype=torch.bool)
    else:
        real = slots < counts[..., None]
    if indices.dim() == 2:  # the same for all layers
        indices, real = indices[None], real[None]
    if indices.dim() == 3:  # the same for all heads
        indices, real = indices[:, :, None], real[:, :, None]

    def compact(layer: int, x: Tensor) -> Tensor:
        batch, heads, length, _ = x.shape
        shape = (batch, heads, indices.shape[-1])
        layer = layer if indices.shape[0] > 1 else 0
        index, present = indices[layer].expand(shape), real[layer].expand(shape)
        if not in_place:
            return _gather(x, 2, index.contiguous(), present.contiguous())
        # Only slots that receive a row are written, and no more than S rows can be real.
        index, present = index[..., :length].contiguous(), present[..., :length].contiguous()
        head = x[:, :, : index.shape[-1]]
        head.copy_(torch.where(present[..., None], _gather(x, 2, index, present), head))
        return x

    return (
        tuple(compact(layer, x) for layer, x in enumerate(keys)),
        tuple(compact(layer, x) for layer, x in enumerate(values)),
    )


def compact_rows(
    tensors: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    align: str = "left",
) -> tuple[Tensor, ...]:
    width = indices.shape[1]
    slots = torch.arange(width, device=indices.device).expand_as(indices)
    real = torch.ones_like(indices, dtype=torch.bool)
    if counts is not None:
        if align == "right":  # slot p takes the row that left alignment puts at p - (K - count)
            slots = slots - (width - counts[:, None])
            indices = indices.gather(1, slots.clamp(min=0))
        real = (slots >= 0) & (slots < counts[:, None])
    return tuple(_gather(x, 1, indices, real) for x in tensors)


# --- merging ----------------------------------------------------------------------------------


def _own_positions(targets: Tensor, length: int) -> Tensor:
    """[B, N]: the position of each row in `targets`, -1 where it is none of them."""
    named = torch.where((targets >= 0) & (targets < length), targets, length)  # the rest: nobody
    position = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    own = targets.new_full((targets.shape[0], length + 1), -1)
    return own.scatter(1, named, position)[:, :length]


def assign_rows(keys: Tensor, targets: Tensor, *, candidates: Tensor | None = None) -> Tensor:
    length = keys.shape[1]
    own = _own_positions(targets, length)
    if length == 0 or targets.shape[1] == 0:
        return own
    keys = _wide(keys)
    square = keys.square().sum(-1)
    finite = square.isfinite()
    assigned = finite if candidates is None else finite & _truth(candidates)

    # The row's own norm is the same for all targets: it does not change which is the best.
    real = (targets >= 0) & (targets < length)
    row = targets.masked_fill(~real, 0)
    inverse = torch.where(square > 0.0, 1.0 / square.sqrt(), 0.0)  # a zero row: cosine 0
    target = _gather(keys, 1, targets, real)
    cosine = _matmul(keys, target.transpose(1, 2)) * inverse.gather(1, row)[:, None]
    wanted = real & finite.gather(1, row)
    nearest = cosine.masked_fill(~wanted[:, None], -math.inf).argmax(-1)  # the first of equals
    nearest = nearest.masked_fill(~(assigned & wanted.any(1, keepdim=True)), -1)
    return torch.where(own >= 0, own, nearest)


def _group_sums(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """[B, groups, C]: sums of the rows of x of each group, in ascending order of rows.

    Rows of group `groups` are left out.
    """
    batch, _, channels = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * (groups + 1)
    index = (group + first).flatten()
    sums = x.new_zeros(batch * (groups + 1), channels)
    if x.is_cuda:  # where index_add adds in any order
        sums = sums.index_put((index,), x.flatten(0, 1), accumulate=True)
    else:
        sums = sums.index_add(0, index, x.flatten(0, 1))
    return sums.view(batch, groups + 1, channels)[:, :groups]


def merge_rows(
    features: Tensor,
    assignment: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    mode: str = "mean",
) -> Tensor:
    length, groups = features.shape[1], targets.shape[1]
    own = _own_positions(targets, length)
    joins = (assignment >= 0) & (assignment < groups)
    group = torch.where(own >= 0, own, torch.where(joins, assignment, groups))
    if mode == "add_mean":  # the others alone
        group = group.masked_fill(own >= 0, groups)

    x = _wide(features)
    weight = torch.ones_like(x[:, :, :1]) if weights is None else weights[:, :, None]
    total = _group_sums(weight.to(x.dtype), group, groups)
    mean = _group_sums(weight * x, group, groups) / total
    real = (targets >= 0) & (targets < length)
    target = _gather(x, 1, targets, real)
    merged = torch.where(total > 0.0, target + mean if mode == "add_mean" else mean, target)
    return merged.masked_fill(~real[:, :, None], 0.0).to(features.dtype)
