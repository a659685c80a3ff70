"""`python -m vtp_kernels selftest`: does what is installed here compute what it should?

Every op, on every device and every backend that can serve there, on fresh random inputs with the
hard ones among them (ties, NaN, infinities, padding that holds NaN, masks, grouped heads, all
dtypes), against `vtp_kernels.reference` in float64 on the CPU. Chosen sets must be equal, moved
rows the same bits, computed numbers within a bound that float32 arithmetic keeps. It takes seconds
on a CPU and needs nothing but torch; on a GPU most of its time is Triton compiling. The tests of
the source tree go much further.
"""

import importlib.util
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp_kernels import _native, ops, reference
from vtp_kernels.ops._dispatch import BACKENDS, FLOATS, why_not

Arguments = dict[str, Any]

LENGTH = 300  # tokens of a sequence: more than a thread block's 256, and no multiple of anything
BATCH = 2
# How far results may be from float64 relative to their size: float32 sums over a head, and exp.
SCORE_BOUND = 1e-5
COSINE_BOUND = 2e-6
# Half outputs are rounded once more: half a unit in the last place, and room for a tie.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Outcome:
    """What came of one op, on one device and backend.

    Attributes:
        op, device, backend: which; device as "cpu", "cuda:0".
        cases: how many inputs were compared.
        seconds: how long that took.
        wrong: None if all agreed, else the first difference.
        missing: None if it ran, else why this backend cannot serve there.
    """

    op: str
    device: str
    backend: str
    cases: int = 0
    seconds: float = 0.0
    wrong: str | None = None
    missing: str | None = None

    def __str__(self) -> str:
        head = f"{self.op:<20}{self.device:<8}{self.backend:<11}"
        if self.missing is not None:
            return f"{head}not checked: {self.missing}"
        if self.wrong is not None:
            return f"{head}WRONG: {self.wrong}"
        return f"{head}ok, {self.cases} inputs, {self.seconds:.2f} s"


def main(seed: int | None = None) -> int:
    """Runs everything and prints a line per op, device and backend. Returns the exit status: 1 if
    a result was wrong, or the installed library does not load."""
    seed = secrets.randbits(32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    failed = 0
    if library_is_broken():
        print(f"WRONG: {_native.missing}")
        failed = 1
    checked = 0
    for outcome in run(seed):
        print(outcome, flush=True)
        failed += outcome.wrong is not None
        checked += outcome.missing is None and outcome.wrong is None
    print(f"{checked} agree with the reference, {failed} do not")
    return 1 if failed else 0


def library_is_broken() -> bool:
    """Whether there is a native library, and it does not load."""
    return _native.missing is not None and importlib.util.find_spec("vtp_kernels._C") is not None


def run(seed: int, devices: Sequence[str] | None = None) -> Iterator[Outcome]:
    """Outcomes one by one. `devices`: None for the CPU and every GPU."""
    if devices is None:
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for op, trial in TRIALS.items():
            for backend in BACKENDS:
                missing = why_not(op, backend, device)
                if missing is not None:
                    yield Outcome(op, device, backend, missing=missing)
                else:
                    yield _outcome(op, trial, device, backend, seed)


def _outcome(op: str, trial: "Trial", device: str, backend: str, seed: int) -> Outcome:
    started, cases = time.perf_counter(), 0
    draw = Draw(seed)
    for arguments in trial.inputs(draw):
        served = {x.dtype for x in _tensors(arguments) if x.is_floating_point()}
        if any(why_not(op, backend, device, dtype) for dtype in served):
            continue
        cases += 1
        wrong = _difference(op, trial, arguments, device, backend)
        if wrong is not None:
            wrong += f" (input {cases} of seed {seed}: {_described(arguments)})"
            return Outcome(op, device, backend, cases, time.perf_counter() - started, wrong)
    return Outcome(op, device, backend, cases, time.perf_counter() - started)


def _difference(
    op: str, trial: "Trial", arguments: Arguments, device: str, backend: str
) -> str | None:
    """What is wrong with the op's result, or None. An op that fails is a difference too."""
    try:
        there = _each(lambda x: x.to(device, copy=True), arguments)
        got = getattr(ops, op)(**there, backend=backend)
        got = _each(lambda x: x.cpu(), got)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return trial.difference(arguments, got)


# --- inputs -----------------------------------------------------------------------------------


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def bools(self, *shape: int, p: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def rows(self, *shape: int, width: int) -> tuple[Tensor, Tensor]:
        """Indices int64 [*shape, width] that ascend, the rest -1, and their counts int32."""
        order = torch.rand(*shape, LENGTH, generator=self.generator).argsort(-1)
        indices = order[..., :width].sort(-1)[0]
        counts = self.integers(0, width + 1, *shape).int()
        indices[torch.arange(width) >= counts[..., None]] = -1
        return indices, counts

    def hard_scores(self, rows: int) -> Tensor:
        """[rows, LENGTH] in turn: NaN and infinities among ties, and ties alone."""
        special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42])
        tied = self.integers(-3, 3, rows, LENGTH).float()
        strange = special[self.integers(0, len(special), rows, LENGTH)]
        odd_rows = (torch.arange(rows) % 2 == 0)[:, None]
        return torch.where(odd_rows & self.bools(rows, LENGTH, p=0.3), strange, tied)


def _attention(draw: Draw, dtype: torch.dtype, rows: int, heads: int, dim: int) -> Arguments:
    valid = draw.bools(BATCH, LENGTH, p=0.9)
    key = draw.normal(BATCH, heads // 2, LENGTH, dim, dtype=dtype)
    return {
        "query": draw.normal(BATCH, heads, rows, dim, dtype=dtype),
        "key": _with_padding(key, valid),
        "candidates": draw.bools(BATCH, LENGTH, p=0.7),
        "valid": valid,
        "query_positions": draw.integers(LENGTH // 2, LENGTH, BATCH, rows),
        "query_valid": draw.bools(BATCH, rows, p=0.9) | (torch.arange(rows) == 0),
    }


def _with_padding(x: Tensor, valid: Tensor) -> Tensor:
    """x [B, H, S, D] with NaN where `valid` [B, S] is False: nobody may read that."""
    return x.masked_fill(~valid[:, None, :, None], math.nan)


def _attention_inputs(draw: Draw) -> Iterator[Arguments]:
    for dtype in FLOATS:
        yield _attention(draw, dtype, rows=1, heads=4, dim=128)
        yield _attention(draw, dtype, rows=5, heads=6, dim=64)
    yield _attention(draw, torch.bfloat16, rows=40, heads=4, dim=128)
    yield {**_attention(draw, torch.float16, 84, 4, 72), "head_reduce": "max"}
    yield {**_attention(draw, torch.float32, 20, 4, 80), "head_reduce": "max"}
    yield {**_attention(draw, torch.float16, 3, 2, 64), "support": "candidates"}


def _attention_topk_inputs(draw: Draw) -> Iterator[Arguments]:
    for arguments in _attention_inputs(draw):
        arguments["k"] = _clear_cut(_reference("attention_scores", arguments), arguments)
        yield {**arguments, "capacity": LENGTH // 2}


def _clear_cut(scores: Tensor, arguments: Arguments) -> Tensor:
    """k int64 [B] such that rounding cannot change which k are the best."""
    ranked = scores.masked_fill(~arguments["candidates"], 0.0).sort(1, descending=True)[0]
    gaps = ranked[:, :-1] / ranked[:, 1:].clamp(min=1e-30)
    first = LENGTH // 20
    return gaps[:, first : LENGTH // 3].argmax(1) + first + 1


def _select_topk_inputs(draw: Draw) -> Iterator[Arguments]:
    for dtype in FLOATS:
        yield {"scores": draw.normal(BATCH, LENGTH, dtype=dtype), "k": LENGTH // 4}
        yield {"scores": draw.hard_scores(6).to(dtype), "k": LENGTH // 3}
    yield {
        "scores": draw.hard_scores(6),
        "k": draw.integers(0, LENGTH, 6),
        "candidates": draw.bools(6, LENGTH, p=0.6),
        "keep": draw.bools(6, LENGTH, p=0.1),
        "threshold": -1.5,
        "capacity": LENGTH // 2,
    }


def _select_diverse_inputs(draw: Draw) -> Iterator[Arguments]:
    """Exact cosines, many of them equal: of rows of four signs, and of rows along axes."""
    for dtype in FLOATS:
        order = draw.normal(BATCH, LENGTH, 32).argsort(-1)
        features = (2.0 * draw.integers(0, 2, BATCH, LENGTH, 32) - 1.0).masked_fill(order > 3, 0.0)
        features[:, ::40, 5], features[:, 7::40] = math.nan, 0.0
        masks = {
            "candidates": draw.bools(BATCH, LENGTH, p=0.8),
            "keep": draw.bools(BATCH, LENGTH, p=0.02),
        }
        yield {"features": features.to(dtype), "k": 40}
        yield {"features": features.to(dtype), "k": 40, "first": 3}
        k = draw.integers(0, 60, BATCH)
        yield {"features": features.to(dtype), "k": k, **masks, "capacity": 45}
        axes = torch.nn.functional.one_hot(draw.integers(0, 32, BATCH, LENGTH), 32)
        sizes = 2.0 ** draw.integers(-3, 4, BATCH, LENGTH)
        relevance = draw.integers(-9, 10, BATCH, LENGTH).float()
        features = (axes * sizes[..., None]).to(dtype)
        yield {"features": features, "k": 40, "rule": "dpp", "relevance": relevance, **masks}


def _token_contribution_inputs(draw: Draw) -> Iterator[Arguments]:
    for dtype in FLOATS:
        for heads, dim in ((8, 64), (2, 128)):
            valid = draw.bools(BATCH, LENGTH, p=0.9)
            shape = (BATCH, heads // 2, LENGTH, dim)
            yield {
                "query": draw.normal(BATCH, heads, dim, dtype=dtype),
                "key": _with_padding(draw.normal(*shape, dtype=dtype), valid),
                "value": _with_padding(draw.normal(*shape, dtype=dtype), valid),
                "candidates": draw.bools(BATCH, LENGTH, p=0.7),
                "valid": valid,
            }


def _passive_attention_inputs(draw: Draw) -> Iterator[Arguments]:
    options = (("merge", "prefix"), ("drop", "causal"), ("merge", "skip"), ("drop", "prefix"))
    for dtype, (sink, visual_rows) in zip(FLOATS, options, strict=True):
        valid = draw.bools(BATCH, LENGTH, p=0.9)
        shape = (BATCH, 2, LENGTH, 64)
        yield {
            "query": draw.normal(BATCH, 4, LENGTH, 64, dtype=dtype),
            "key": _with_padding(draw.normal(*shape, dtype=dtype), valid),
            "value": _with_padding(draw.normal(*shape, dtype=dtype), valid),
            "visual": draw.bools(BATCH, LENGTH, p=0.6),
            "valid": valid,
            "sink": sink,
            "visual_rows": visual_rows,
        }


def _compact_kv_inputs(draw: Draw) -> Iterator[Arguments]:
    for dtype in FLOATS:
        for shape in ((BATCH,), (2, BATCH), (2, BATCH, 3)):
            layers = [draw.normal(BATCH, 3, LENGTH, 40, dtype=dtype) for _ in range(4)]
            layers[1][:, :, ::7] = math.nan
            indices, counts = draw.rows(*shape, width=LENGTH // 2)
            rows = {"keys": layers[:2], "values": layers[2:], "indices": indices, "counts": counts}
            yield rows
            yield {**rows, "in_place": True}


def _compact_rows_inputs(draw: Draw) -> Iterator[Arguments]:
    for align in ("left", "right"):
        indices, counts = draw.rows(BATCH, width=LENGTH // 2)
        yield {
            "tensors": [
                *(draw.normal(BATCH, LENGTH, 24, dtype=dtype) for dtype in FLOATS[:3]),
                draw.integers(-9, 9, BATCH, LENGTH),
                draw.bools(BATCH, LENGTH, p=0.5),
            ],
            "indices": indices,
            "counts": counts,
            "align": align,
        }


def _inflection_inputs(draw: Draw) -> Iterator[Arguments]:
    for rule in ("chord", "kneedle", "iqr", "mass"):
        for dtype in FLOATS:
            yield {"curve": draw.normal(BATCH, LENGTH).exp().to(dtype), "rule": rule}
        yield {"curve": draw.hard_scores(6), "rule": rule, "min_keep": 3, "max_keep": LENGTH // 2}


def _cls_inflection_inputs(draw: Draw) -> Iterator[Arguments]:
    for rule, dtype in zip(("chord", "kneedle", "iqr", "mass"), FLOATS, strict=True):
        cls = draw.normal(BATCH, 96)
        features = draw.normal(BATCH, LENGTH, 96)
        features += draw.normal(BATCH, LENGTH, 1).exp() / 8 * cls[:, None]
        features[:, ::50] = 0.0  # similar to nothing
        yield {"features": features.to(dtype), "cls": cls.to(dtype), "rule": rule}


def _target_rows(draw: Draw) -> Tensor:
    """int64 [B, 40]: different rows in any order, some of them padding."""
    order = torch.rand(BATCH, LENGTH, generator=draw.generator).argsort(-1)[:, :40]
    return order.masked_fill(draw.bools(BATCH, 40, p=0.2), -1)


def _assign_rows_inputs(draw: Draw) -> Iterator[Arguments]:
    for dtype in FLOATS:
        for width in (33, 128):
            keys = draw.normal(BATCH, LENGTH, width, dtype=dtype)
            keys[:, ::50] = 0.0
            keys[:, 7::60] = math.nan
            yield {
                "keys": keys,
                "targets": _target_rows(draw),
                "candidates": draw.bools(BATCH, LENGTH, p=0.9),
            }


def _merge_rows_inputs(draw: Draw) -> Iterator[Arguments]:
    for mode in ("mean", "add_mean", "weighted"):
        for dtype in FLOATS:
            targets = _target_rows(draw)
            assignment = draw.integers(-1, 40, BATCH, LENGTH)
            features = draw.normal(BATCH, LENGTH, 72, dtype=dtype)
            is_target = (targets[:, None] == torch.arange(LENGTH)[:, None]).any(-1)
            features[(assignment < 0) & ~is_target] = math.nan  # rows that nobody may read
            weights = torch.rand(BATCH, LENGTH, generator=draw.generator)
            yield {
                "features": features,
                "assignment": assignment,
                "targets": targets,
                "weights": weights if mode == "weighted" else None,
                "mode": mode,
            }


# --- comparisons ------------------------------------------------------------------------------


def _reference(op: str, arguments: Arguments):
    """What the reference makes of the arguments in float64."""
    wide = ("query", "key", "value", "features", "cls", "keys", "weights")
    exact = {
        name: x.double() if name in wide and x is not None else x for name, x in arguments.items()
    }
    return getattr(reference, op)(**exact)


def _scores_differ(arguments: Arguments, got: Tensor) -> str | None:
    return _far("scores", got, _reference("attention_scores", arguments), SCORE_BOUND)


def _attention_topk_differs(arguments: Arguments, got) -> str | None:
    selection, scores = got
    want, want_scores = _reference("attention_topk", arguments)
    far = _far("scores", scores, want_scores, SCORE_BOUND)
    return far or _sets_differ(selection, want)


def _selection_differs(op: str) -> Callable[[Arguments, Any], str | None]:
    """For ops whose input is the ranking itself: taken as it is, not widened."""

    def difference(arguments: Arguments, got) -> str | None:
        return _sets_differ(got, getattr(reference, op)(**arguments))

    return difference


def _contribution_differs(arguments: Arguments, got) -> str | None:
    cosine, norm = got
    want_cosine, want_norm = _reference("token_contribution", arguments)
    far = _far("norm", norm, want_norm, SCORE_BOUND)
    # The cosine cancels as what is left without a token gets short; no token here weighs that much.
    return far or _far("cosine", cosine, want_cosine, 0.0, 20 * COSINE_BOUND)


def _passive_attention_differs(arguments: Arguments, got: Tensor) -> str | None:
    want = _reference("passive_attention", arguments)
    largest = arguments["value"].nan_to_num().abs().amax().item()
    return _far("output", got, want, ROUNDING.get(got.dtype, 0.0), SCORE_BOUND * largest)


def _rows_differ(op: str) -> Callable[[Arguments, Any], str | None]:
    def difference(arguments: Arguments, got) -> str | None:
        want = getattr(reference, op)(**_each(Tensor.clone, arguments))
        for i, (x, y) in enumerate(zip(_tensors(got), _tensors(want), strict=True)):
            if x.dtype != y.dtype or x.shape != y.shape or not _same_bits(x, y):
                return f"tensor {i} of the result has other rows than it should"
        return None

    return difference


def _cls_inflection_differs(arguments: Arguments, got) -> str | None:
    selection, similarity = got
    exact = {name: arguments[name] for name in ("features", "cls")}
    far = _far("similarity", similarity, _reference("cls_inflection", exact)[1], 0.0, COSINE_BOUND)
    return far or _sets_differ(selection, reference.inflection(similarity, rule=arguments["rule"]))


def _assign_rows_differs(arguments: Arguments, got: Tensor) -> str | None:
    """Where the cosine of the chosen target is not the largest, to within rounding."""
    want = _reference("assign_rows", arguments)
    unit = torch.nn.functional.normalize(arguments["keys"].double(), dim=-1)
    targets = arguments["targets"]

    def cosine(position: Tensor) -> Tensor:
        row = targets.gather(1, position.clamp(0, targets.shape[1] - 1)).clamp(min=0)
        target = unit.gather(1, row[..., None].expand_as(unit))
        return (unit * target).sum(-1)

    same = (got == want) | ((got >= 0) & (want >= 0) & (cosine(got) >= cosine(want) - COSINE_BOUND))
    if bool(same.all()):
        return None
    b, row = (~same).nonzero()[0].tolist()
    return f"assignment[{b}, {row}] is {int(got[b, row])}, expected {int(want[b, row])}"


def _merge_rows_differs(arguments: Arguments, got: Tensor) -> str | None:
    want = _reference("merge_rows", arguments)
    largest = arguments["features"].nan_to_num().abs().amax().item()
    return _far("merged", got, want, ROUNDING.get(got.dtype, 0.0), SCORE_BOUND * largest)


def _far(name: str, got: Tensor, want: Tensor, relative: float, absolute: float = 1e-30):
    """None, or where `got` is further from `want` than allowed."""
    if got.shape != want.shape:
        return f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got.double() - want).abs()
    bad = ~(error <= absolute + relative * want.abs())  # NaN is bad
    if not bool(bad.any()):
        return None
    where = tuple(bad.nonzero()[0].tolist())
    return f"{name}{list(where)} is {got[where].item():.9g}, expected {want[where].item():.9g}"


def _sets_differ(got, want) -> str | None:
    """None, or the first row in which two selections differ."""
    if got.indices.shape != want.indices.shape or got.counts.shape != want.counts.shape:
        return f"indices have shape {tuple(got.indices.shape)}, not {tuple(want.indices.shape)}"
    for b in range(len(want.counts)):
        mine, other = got.indices[b].tolist(), want.indices[b].tolist()
        if mine != other or got.counts[b] != want.counts[b]:
            added, lost = sorted({*mine} - {*other}), sorted({*other} - {*mine})
            return f"row {b} has {added[:5]} too many, lacks {lost[:5]}"
    return None


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether x and y hold the same bits. Any NaN equals any other: torch's own gather of bfloat16
    changes theirs."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    same = x.contiguous().view(integers) == y.contiguous().view(integers)
    return bool((same | (x.isnan() & y.isnan())).all())


def _each(function: Callable[[Tensor], Tensor], x):
    """The same dicts, lists and tuples with function(x) for every tensor x."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: _each(function, part) for name, part in x.items()}
    if hasattr(x, "_fields"):
        return type(x)(*(_each(function, part) for part in x))
    return type(x)(_each(function, part) for part in x) if isinstance(x, (list, tuple)) else x


def _tensors(x) -> list[Tensor]:
    found: list[Tensor] = []
    _each(lambda tensor: found.append(tensor) or tensor, x)
    return found


def _described(arguments: Arguments) -> str:
    def word(x) -> str:
        if not isinstance(x, Tensor):
            return f"{len(x)} tensors" if isinstance(x, (list, tuple)) else repr(x)
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"

    return ", ".join(f"{name} {word(x)}" for name, x in arguments.items())


@dataclass(frozen=True)
class Trial:
    """How an op is tried: `inputs(draw)` yields its arguments, `difference(arguments, result)` says
    what is wrong with a result, or None."""

    inputs: Callable[[Draw], Iterator[Arguments]]
    difference: Callable[[Arguments, Any], str | None]


TRIALS = {
    "attention_scores": Trial(_attention_inputs, _scores_differ),
    "select_topk": Trial(_select_topk_inputs, _selection_differs("select_topk")),
    "select_diverse": Trial(_select_diverse_inputs, _selection_differs("select_diverse")),
    "attention_topk": Trial(_attention_topk_inputs, _attention_topk_differs),
    "token_contribution": Trial(_token_contribution_inputs, _contribution_differs),
    "compact_kv": Trial(_compact_kv_inputs, _rows_differ("compact_kv")),
    "compact_rows": Trial(_compact_rows_inputs, _rows_differ("compact_rows")),
    "inflection": Trial(_inflection_inputs, _selection_differs("inflection")),
    "cls_inflection": Trial(_cls_inflection_inputs, _cls_inflection_differs),
    "passive_attention": Trial(_passive_attention_inputs, _passive_attention_differs),
    "assign_rows": Trial(_assign_rows_inputs, _assign_rows_differs),
    "merge_rows": Trial(_merge_rows_inputs, _merge_rows_differs),
}
