"""Every op on every path that its kernels have, for tests that hold for all of them alike.

A variant draws arguments whose contents may change from call to call (in a captured graph, say)
and names options that may not. It calls the op and knows what the result must be: the reference,
in float64, on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vtp_kernels as vtp
from vtp_kernels import reference

NAN, INF = math.nan, math.inf
BATCH = 3


@dataclass(frozen=True)
class Variant:
    """One op, one way to call it. `make(draw, batch, length)` draws the arguments."""

    op: str
    path: str
    make: Callable[..., dict]
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.path}"

    @property
    def in_place(self) -> bool:
        return self.options.get("in_place", False)

    def draw(self, draw, length: int, batch: int = BATCH) -> dict:
        return self.make(draw, batch, length)

    def call(self, arguments: dict, backend: str | None = "native") -> list[Tensor]:
        """The tensors of the result. In place, the arguments hold it as well."""
        return flat(getattr(vtp, self.op)(**arguments, **self.options, backend=backend))

    def run(self, arguments: dict, backend: str | None = "native") -> list[Tensor]:
        """As `call`, and the arguments stay as they are."""
        return self.call(cloned(arguments) if self.in_place else arguments, backend)

    def check(self, arguments: dict, got: list[Tensor]) -> None:
        """Raises unless `got` is what the reference makes of the arguments."""
        arguments = each(Tensor.cpu, arguments)
        _CHECKS[self.op](arguments, self.options, [x.cpu() for x in got])


# --- arguments: dicts of tensors, of lists of tensors, and of numbers ---------------------------


def flat(result) -> list[Tensor]:
    """The tensors of any op's result, or of arguments, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = result.values()
    elif not isinstance(result, (list, tuple)):
        return []
    return [x for part in result for x in flat(part)]


def each(function: Callable[[Tensor], Tensor], arguments):
    """The same arguments with every tensor x replaced by function(x)."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, dict):
        return {name: each(function, value) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return [each(function, value) for value in arguments]
    return arguments


def cloned(arguments):
    return each(Tensor.clone, arguments)


def refill(static: dict, fresh: dict) -> None:
    """Copies the contents of `fresh` into the tensors of `static`."""
    for x, y in zip(flat(static), flat(fresh), strict=True):
        x.copy_(y)


def emptied(arguments: dict) -> dict:
    """Nothing chosen, nothing valid: masks False, counts and k zero, rows and positions -1."""

    def empty(name, x):
        if name in ("k", "counts") or (isinstance(x, Tensor) and x.dtype == torch.bool):
            return torch.zeros_like(x) if isinstance(x, Tensor) else x
        return torch.full_like(x, -1) if name in ("indices", "assignment", "targets") else x

    return {name: empty(name, x) for name, x in arguments.items()}


def filled(arguments: dict) -> dict:
    """Everything valid, a candidate, and real: masks True, counts and k as large as they can be."""
    width = arguments["indices"].shape[-1] if "indices" in arguments else 0

    def fill(name, x):
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.bool:
            return torch.ones_like(x)
        if name == "indices":
            return torch.arange(width, device=x.device).expand(x.shape).contiguous()
        if name == "counts":
            return torch.full_like(x, width)
        return torch.full_like(x, 2**31 - 1) if name == "k" else x

    return {name: fill(name, x) for name, x in arguments.items()}


def row(arguments: dict, b: int) -> dict:
    """Sequence b of the batch alone."""

    def slice_(name, x):
        if isinstance(x, (list, tuple)):
            return [part[b : b + 1] for part in x]
        if name in ("indices", "counts") and arguments["indices"].dim() > 2:
            return x[:, b : b + 1].contiguous()  # layers stand first
        return x[b : b + 1] if isinstance(x, Tensor) else x

    return {name: slice_(name, x) for name, x in arguments.items()}


def bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN equals itself, and -0.0 is not 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if not torch.equal(bits(x), bits(y)):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)  # says where
            raise AssertionError("equal numbers, other bits")


def hard_rows(draw, batch: int, length: int) -> Tensor:
    """Scores that are hard to rank: NaN, infinities, ties, subnormals, shared leading bits."""
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-42], device=draw.device)

    def ordinary():
        return draw.normal(length)

    def mixed():
        picks = special[draw.integers(0, len(special), length)]
        return torch.where(draw.bools(length, p=0.3), picks, draw.normal(length))

    def tied():
        return draw.integers(0, 3, length).float()

    def probabilities():
        return draw.uniform(length) * 1e-5

    def infinite():
        return torch.where(draw.bools(length), INF, draw.normal(length))

    def subnormal():
        return draw.integers(-40, 40, length).float() * 2.0**-149

    def nothing():
        return torch.full((length,), NAN, device=draw.device)

    kinds = (mixed, probabilities, tied, ordinary, infinite, subnormal, nothing)
    return torch.stack([kinds[b % len(kinds)]() for b in range(batch)])


# --- how arguments are drawn --------------------------------------------------------------------


def attention(dtype, heads, kv_heads, rows, dim, masks=True, lse=False, **numbers):
    def make(draw, batch, length):
        arguments = {
            "query": draw.normal(batch, heads, rows, dim, dtype=dtype),
            "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
            "candidates": draw.bools(batch, length, p=0.8),
        }
        if masks:
            arguments["valid"] = draw.bools(batch, length, p=0.9)
            arguments["query_positions"] = draw.integers(-1, length + 1, batch, rows)
            arguments["query_valid"] = draw.bools(batch, rows, p=0.8)
        if lse:
            drawn = draw.normal(batch, heads, rows) + math.log(max(length, 1))
            arguments["lse"] = torch.where(draw.bools(batch, heads, rows, p=0.1), -INF, drawn)
        return {**arguments, **{name: number(length) for name, number in numbers.items()}}

    return make


def attention_and_k(dtype, heads, kv_heads, rows, dim):
    scores = attention(dtype, heads, kv_heads, rows, dim, capacity=lambda length: length // 2 + 1)

    def make(draw, batch, length):
        return {
            **scores(draw, batch, length),
            "k": draw.integers(-1, length // 2 + 2, batch),
            "keep": draw.bools(batch, length, p=0.1),
        }

    return make


def scores_alone(dtype):
    def make(draw, batch, length):
        return {"scores": hard_rows(draw, batch, length).to(dtype), "k": length // 9}

    return make


def scores_and_masks(k_dtype):
    def make(draw, batch, length):
        return {
            "scores": hard_rows(draw, batch, length),
            "k": draw.integers(-2, length + 3, batch, dtype=k_dtype),
            "candidates": draw.bools(batch, length, p=0.7),
            "keep": draw.bools(batch, length, p=0.2),
            "capacity": length // 2 + 1,
        }

    return make


def signed_rows(dtype, channels, masks=False):
    """Four signs in a row, and zeros: the cosines are exact, and many of them equal."""

    def make(draw, batch, length):
        order = draw.uniform(batch, length, channels).argsort(-1)
        features = (2.0 * draw.bools(batch, length, channels) - 1.0).masked_fill(order > 3, 0.0)
        features[:, 5::11, 0] = NAN
        arguments = {"features": features.to(dtype), "k": length // 9}
        if masks:
            arguments["k"] = draw.integers(-2, length + 3, batch)
            arguments["candidates"] = draw.bools(batch, length, p=0.7)
            arguments["keep"] = draw.bools(batch, length, p=0.05)
            arguments["capacity"] = length // 2 + 1
        return arguments

    return make


def axes(dtype, channels):
    """Rows along axes, which "dpp" takes once each."""

    def make(draw, batch, length):
        axis = draw.integers(0, channels, batch, length)
        sizes = 2.0 ** draw.integers(-3, 4, batch, length)
        features = torch.nn.functional.one_hot(axis, channels) * sizes[..., None]
        return {
            "features": features.to(dtype),
            "k": draw.integers(-2, channels, batch),
            "relevance": draw.integers(-9, 10, batch, length).float(),
            "candidates": draw.bools(batch, length, p=0.7),
            "keep": draw.bools(batch, length, p=0.05),
            "capacity": length // 2 + 1,
        }

    return make


def one_query(dtype, heads, kv_heads, dim):
    def make(draw, batch, length):
        return {
            "query": draw.normal(batch, heads, dim, dtype=dtype),
            "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
            "value": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
            "candidates": draw.bools(batch, length, p=0.8),
            "valid": draw.bools(batch, length, p=0.9),
        }

    return make


def prompt(dtype, heads, kv_heads, dim):
    def make(draw, batch, length):
        return {
            "query": draw.normal(batch, heads, length, dim, dtype=dtype),
            "key": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
            "value": draw.normal(batch, kv_heads, length, dim, dtype=dtype),
            "visual": draw.bools(batch, length, p=0.6),
            "valid": draw.bools(batch, length, p=0.9),
        }

    return make


def cache(dtype, heads, dim, layers, indices="all"):
    """`indices`: shared by "all", one set a "layer", or one a "head" of every layer."""

    def make(draw, batch, length):
        def number():
            x = draw.normal(batch, heads, length, dim) * 50
            return x.to(dtype)

        width = max(length // 2, 1)
        sets = {"all": (), "layer": (layers,), "head": (layers,)}[indices]
        inner = (heads,) if indices == "head" else ()
        shape = (*sets, batch, *inner)
        rows, counts = draw.rows(math.prod(shape), length, width)
        return {
            "keys": [number() for _ in range(layers)],
            "values": [number() for _ in range(layers)],
            "indices": rows.view(*shape, width),
            "counts": counts.view(shape),
        }

    return make


def row_tensors(draw, batch, length):
    indices, counts = draw.rows(batch, length, max(length // 2, 1))
    return {
        "tensors": [
            draw.normal(batch, length, 72, dtype=torch.bfloat16),
            draw.normal(batch, length, 2, 5),
            draw.integers(-9, 9, batch, length),
            draw.bools(batch, length),
            draw.normal(batch, length, 3, dtype=torch.float16),
        ],
        "indices": indices,
        "counts": counts,
    }


def curve(dtype, max_keep=None):
    def make(draw, batch, length):
        arguments = {"curve": draw.normal(batch, length).exp().to(dtype)}
        return arguments if max_keep is None else {**arguments, "max_keep": length // max_keep}

    return make


def hard_curve(draw, batch, length):
    return {"curve": hard_rows(draw, batch, length)}


def patches(dtype, channels):
    def make(draw, batch, length):
        cls = draw.normal(batch, channels)
        features = draw.normal(batch, length, channels)
        features += draw.normal(batch, length, 1).exp() / 8 * cls[:, None]
        return {"features": features.to(dtype), "cls": cls.to(dtype)}

    return make


def target_rows(draw, batch, length):
    """Different rows in any order, one of four padding."""
    order = draw.uniform(batch, length).argsort(1)[:, : max(length // 9, 1)]
    return order.masked_fill(draw.bools(*order.shape, p=0.25), -1)


def keys_and_targets(dtype, dim):
    def make(draw, batch, length):
        return {
            "keys": draw.normal(batch, length, dim, dtype=dtype),
            "targets": target_rows(draw, batch, length),
            "candidates": draw.bools(batch, length, p=0.8),
        }

    return make


def assigned_rows(dtype, channels, weighted=False):
    def make(draw, batch, length):
        targets = target_rows(draw, batch, length)
        arguments = {
            "features": draw.normal(batch, length, channels, dtype=dtype),
            "assignment": draw.integers(-1, targets.shape[1], batch, length),
            "targets": targets,
        }
        return {**arguments, "weights": draw.uniform(batch, length)} if weighted else arguments

    return make


HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32

VARIANTS = [
    Variant("attention_scores", "last-token", attention(BFLOAT, 8, 8, 1, 128, masks=False)),
    Variant("attention_scores", "one-row", attention(FLOAT, 8, 2, 1, 64)),
    Variant("attention_scores", "rows", attention(HALF, 8, 2, 5, 64), {"scale": 0.2}),
    Variant(
        "attention_scores",
        "candidates-alone",
        attention(FLOAT, 6, 3, 3, 80),
        {"support": "candidates", "head_reduce": "max"},
    ),
    Variant("attention_scores", "some-rows", attention(BFLOAT, 4, 1, 9, 128)),
    # The next two with products of a warpgroup on compute capability 9.0: many rows on a KV head.
    Variant("attention_scores", "many-rows", attention(BFLOAT, 4, 1, 33, 128)),
    Variant(
        "attention_scores", "many-rows-max", attention(HALF, 2, 1, 84, 72), {"head_reduce": "max"}
    ),
    Variant("attention_scores", "wide-heads", attention(BFLOAT, 2, 2, 17, 256)),
    Variant(
        "attention_scores", "lse", attention(BFLOAT, 4, 2, 7, 96, lse=True), {"head_reduce": "sum"}
    ),
    Variant(
        "attention_topk",
        "last-token",
        attention(HALF, 8, 8, 1, 128, masks=False, k=lambda length: length // 9),
    ),
    Variant("attention_topk", "k-per-row", attention_and_k(BFLOAT, 8, 2, 5, 64)),
    Variant(
        "attention_topk", "threshold", attention_and_k(FLOAT, 4, 4, 3, 80), {"threshold": 1e-3}
    ),
    Variant("select_topk", "float32", scores_alone(FLOAT)),
    Variant("select_topk", "bfloat16", scores_alone(BFLOAT)),
    Variant("select_topk", "float16", scores_alone(HALF)),
    Variant("select_topk", "masks", scores_and_masks(torch.int32), {"threshold": -0.5}),
    Variant("select_topk", "k-per-row", scores_and_masks(torch.int64)),
    Variant("select_diverse", "maxmin", signed_rows(BFLOAT, 64)),
    Variant("select_diverse", "masks", signed_rows(FLOAT, 37, masks=True)),
    Variant("select_diverse", "dpp", axes(HALF, 40), {"rule": "dpp"}),
    Variant("token_contribution", "bfloat16", one_query(BFLOAT, 8, 4, 128)),
    Variant("token_contribution", "float32", one_query(FLOAT, 6, 2, 80), {"scale": 0.05}),
    Variant("token_contribution", "float16", one_query(HALF, 8, 8, 64)),
    Variant("passive_attention", "merge-prefix", prompt(BFLOAT, 4, 2, 128)),
    Variant(
        "passive_attention",
        "drop-causal",
        prompt(HALF, 4, 1, 64),
        {"sink": "drop", "visual_rows": "causal"},
    ),
    Variant(
        "passive_attention",
        "merge-skip-renormalize",
        prompt(FLOAT, 2, 2, 80),
        {"visual_rows": "skip", "renormalize": True},
    ),
    Variant(
        "passive_attention",
        "drop-prefix-renormalize",
        prompt(BFLOAT, 2, 1, 96),
        {"sink": "drop", "renormalize": True},
    ),
    Variant("compact_kv", "bfloat16", cache(BFLOAT, 4, 128, 3)),
    Variant("compact_kv", "per-head", cache(FLOAT, 3, 80, 2, "head")),
    Variant("compact_kv", "odd-rows", cache(torch.int8, 2, 7, 2, "layer")),
    Variant("compact_kv", "in-place", cache(BFLOAT, 4, 128, 3), {"in_place": True}),
    Variant("compact_kv", "in-place-per-head", cache(FLOAT, 3, 80, 2, "head"), {"in_place": True}),
    Variant(
        "compact_kv", "in-place-odd-rows", cache(torch.int8, 2, 7, 2, "layer"), {"in_place": True}
    ),
    Variant("compact_rows", "left", row_tensors),
    Variant("compact_rows", "right", row_tensors, {"align": "right"}),
    Variant("inflection", "chord", curve(FLOAT)),
    Variant("inflection", "kneedle", curve(BFLOAT), {"rule": "kneedle"}),
    Variant("inflection", "iqr", curve(HALF, max_keep=2), {"rule": "iqr", "min_keep": 0}),
    Variant("inflection", "mass", curve(FLOAT), {"rule": "mass", "mass": 0.8}),
    Variant("inflection", "hard", hard_curve, {"clip_quantile": 1.0}),
    Variant("cls_inflection", "chord", patches(HALF, 1024)),
    Variant("cls_inflection", "mass", patches(FLOAT, 83), {"rule": "mass"}),
    Variant("assign_rows", "bfloat16", keys_and_targets(BFLOAT, 64)),
    Variant("assign_rows", "float32", keys_and_targets(FLOAT, 80)),
    Variant("assign_rows", "odd-rows", keys_and_targets(HALF, 33)),
    Variant("merge_rows", "mean", assigned_rows(BFLOAT, 1024)),
    Variant("merge_rows", "add-mean", assigned_rows(HALF, 83), {"mode": "add_mean"}),
    Variant("merge_rows", "weighted", assigned_rows(FLOAT, 72, True), {"mode": "weighted"}),
]
OPS = sorted({variant.op for variant in VARIANTS})
#: Those that hold a row of scores in one block, as long as it fits.
LONG = [variant for variant in VARIANTS if variant.op in ("select_topk", "inflection")]


# --- what results must be -----------------------------------------------------------------------


def _wide(arguments: dict) -> dict:
    return each(lambda x: x.double() if x.is_floating_point() else x, arguments)


def _split(arguments: dict, names: tuple[str, ...]) -> tuple[dict, dict]:
    chosen = {name: x for name, x in arguments.items() if name in names}
    return chosen, {name: x for name, x in arguments.items() if name not in names}


_SELECTING = ("k", "keep", "threshold", "capacity")


def _check_scores(arguments, options, got) -> None:
    """1e-5 relative, as in tests/ops; the absolute part covers scores that underflow."""
    want = reference.attention_scores(**_wide(arguments), **options)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-30)


def _check_selection(selection: list[Tensor], want) -> None:
    assert_same_bits(selection, list(want))


def _check_attention_topk(arguments, options, got) -> None:
    selecting, scoring = _split({**arguments, **options}, _SELECTING)
    _check_scores(scoring, {}, got[2:])
    selecting["candidates"] = arguments["candidates"]
    _check_selection(got[:2], reference.select_topk(got[2], **selecting))


def _check_select_topk(arguments, options, got) -> None:
    _check_selection(got, reference.select_topk(**arguments, **options))


def _check_select_diverse(arguments, options, got) -> None:
    _check_selection(got, reference.select_diverse(**arguments, **options))


def _check_token_contribution(arguments, options, got) -> None:
    """As in tests/ops, where cosines are bounded case by case: no token is nearly all here."""
    cosine, norm = reference.token_contribution(**_wide(arguments), **options)
    torch.testing.assert_close(got[0].double(), cosine, rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1].double(), norm, rtol=1e-5, atol=1e-30)


def _check_passive_attention(arguments, options, got) -> None:
    """1e-5 of the largest value, and one rounding of half numbers on the way out."""
    want = reference.passive_attention(**_wide(arguments), **options)
    rounding = {BFLOAT: 2.0**-8, HALF: 2.0**-11, FLOAT: 0.0}[got[0].dtype]
    atol = 1e-5 * arguments["value"].abs().amax().item() if want.numel() else 0.0
    torch.testing.assert_close(got[0].double(), want, rtol=rounding, atol=atol)


def _check_rows(arguments, options, got) -> None:
    op = reference.compact_kv if "keys" in arguments else reference.compact_rows
    assert_same_bits(got, flat(op(**cloned(arguments), **options)))


def _check_inflection(arguments, options, got) -> None:
    _check_selection(got, reference.inflection(**arguments, **options))


def _check_cls_inflection(arguments, options, got) -> None:
    """The knee of the very similarities that came back; these within float32 rounding."""
    features, cls = (arguments[name].double() for name in ("features", "cls"))
    want = torch.nn.functional.cosine_similarity(features, cls[:, None], dim=-1)
    torch.testing.assert_close(got[2].double(), want, rtol=1e-5, atol=1e-6)
    _check_selection(got[:2], reference.inflection(got[2], **options))


def _check_assign_rows(arguments, options, got) -> None:
    """The target of largest cosine, or one within float32 rounding of it."""
    want = reference.assign_rows(**_wide(arguments), **options)
    assert torch.equal(got[0] < 0, want < 0)
    unit = torch.nn.functional.normalize(arguments["keys"].double(), dim=-1)
    row = torch.arange(want.shape[1])
    for b in range(len(want)):
        mine, best = (
            (unit[b] * unit[b, arguments["targets"][b, x.clamp(min=0)]]).sum(-1)
            for x in (got[0][b], want[b])
        )
        close = torch.isclose(mine, best, rtol=0, atol=1e-6) | (want[b] < 0)
        assert close.all(), (b, row[~close], mine[~close], best[~close])


def _check_merge_rows(arguments, options, got) -> None:
    """All add in the same order, so the bits are the same."""
    assert_same_bits(got, [reference.merge_rows(**arguments, **options)])


_CHECKS = {
    "attention_scores": _check_scores,
    "attention_topk": _check_attention_topk,
    "select_topk": _check_select_topk,
    "select_diverse": _check_select_diverse,
    "token_contribution": _check_token_contribution,
    "passive_attention": _check_passive_attention,
    "compact_kv": _check_rows,
    "compact_rows": _check_rows,
    "inflection": _check_inflection,
    "cls_inflection": _check_cls_inflection,
    "assign_rows": _check_assign_rows,
    "merge_rows": _check_merge_rows,
}
