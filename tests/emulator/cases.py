"""Small hard inputs for every op: ragged, empty, strided, misaligned, NaN where nobody looks.

    python tests/emulator/cases.py <variant> <seed> [<op>...]

runs them on a build of the emulated kernels.
"""

import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emulator import build

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("dense", "padded", "shifted", "permuted")
LENGTHS = (1, 7, 64, 65, 257)
DIMS = (1, 8, 33, 64, 128, 136)
HEADS = ((1, 1), (4, 2), (6, 1), (8, 8))  # of query and key


class Case(NamedTuple):
    op: str
    text: str  # what is special about it
    arguments: tuple
    architecture: int  # what kernels count as compiled for


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in memory that ends with its last element; what lies between rows is no valid number.

    padded: rows apart from each other; shifted: begins one element late; permuted: rows of all
    heads side by side.
    """
    order = list(range(x.dim()))
    if layout == "permuted" and x.dim() == 4:
        order[1], order[2] = order[2], order[1]
    strides, step = [1] * x.dim(), 1
    for i in reversed(order):
        strides[i] = step
        step = step * x.shape[i] + (3 if layout == "padded" and i == order[-1] else 0)
    offset = int(layout == "shifted")
    extent = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    memory = torch.empty(offset + (extent if x.numel() else 0), dtype=x.dtype)
    memory.view(torch.uint8).fill_(0xFF)
    out = memory.as_strided(x.shape, strides, offset)
    return out.copy_(x)


class Draw:
    """Random arguments; each tensor in the layout in force."""

    def __init__(self, seed: int):
        self.choices = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.layout = "dense"
        self.dtype = torch.float32

    def any(self, *options):
        return self.choices.choice(options)

    def normal(self, *shape, dtype=None):
        x = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return laid_out(x, self.layout)

    def bools(self, *shape, p=0.5):
        """True is any byte but 0."""
        byte = torch.randint(1, 256, shape, generator=self.generator).to(torch.uint8)
        byte[torch.rand(shape, generator=self.generator) >= p] = 0
        return laid_out(byte.view(torch.bool), self.layout)

    def integers(self, high, *shape, dtype=torch.int64):
        x = torch.randint(0, max(high, 1), shape, generator=self.generator)
        return laid_out(x.to(dtype), self.layout)

    def maybe(self, x):
        """x or None."""
        return self.any(x, None)

    def rows(self, batch, length, width):
        """Ascending indices [batch, width] with nonsense past the count, counts [batch]."""
        counts = torch.randint(0, min(width, length) + 1, (batch,), generator=self.generator)
        indices = torch.full((batch, width), -(2**40))
        for b, count in enumerate(counts.tolist()):
            chosen = torch.randperm(length, generator=self.generator)[:count]
            indices[b, :count] = chosen.sort()[0]
        counts = counts.to(self.any(torch.int32, torch.int64))
        return laid_out(indices, self.layout), laid_out(counts, self.layout)


# ---- Arguments of each op, as torch.ops takes them -----------------------------------------------


def keys(draw, batch, heads, length, dim, valid):
    """Keys or values, NaN where they are padding."""
    x = draw.normal(batch, heads, length, dim)
    return x if valid is None else x.masked_fill_(~valid[:, None, :, None], torch.nan)


def attention(draw, batch, length, shape=None):
    drawn = draw.any(*HEADS), draw.any(*DIMS), draw.any(1, 3, 16, 17, 70)
    (heads, kv_heads), dim, rows = shape or drawn
    valid = draw.maybe(draw.bools(batch, length, p=0.8))
    support = draw.any("all", "candidates")
    lse = draw.normal(batch, heads, rows, dtype=torch.float32)
    return (
        draw.normal(batch, heads, rows, dim),
        keys(draw, batch, kv_heads, length, dim, valid),
        draw.bools(batch, length, p=0.8),
        valid,
        draw.maybe(draw.integers(length, batch, rows)),
        draw.maybe(draw.bools(batch, rows, p=0.8)),
        draw.maybe(lse) if support == "all" else None,
        dim**-0.5,
        support,
        draw.any("mean", "max", "sum"),
    )


def selection(draw, batch, length):
    """k_per_row, k and what follows the scores' masks."""
    width = draw.any(0, 1, 5, max(length // 2, 1), length)
    per_row = draw.integers(length + 3, batch, dtype=draw.any(torch.int32, torch.int64))
    return draw.maybe(per_row), draw.any(0, width), draw.any(None, -0.5), width


def attention_topk(draw, batch, length, shape=None):
    *head, lse, scale, support, head_reduce = attention(draw, batch, length, shape)
    query, key, *masks = head
    per_row, k, threshold, width = selection(draw, batch, length)
    keep = draw.maybe(draw.bools(batch, length, p=0.1))
    return (
        *(query, key, per_row, k, *masks, lse, scale, support, head_reduce),
        *(keep, threshold, width),
    )


def select_topk(draw, batch, length):
    per_row, k, threshold, width = selection(draw, batch, length)
    scores = draw.normal(batch, length)
    if draw.any(True, False):  # ties, infinities and NaN
        scores.mul_(2).round_()
        scores[draw.bools(batch, length, p=0.05)] = draw.any(torch.inf, -torch.inf, torch.nan)
    candidates = draw.maybe(draw.bools(batch, length, p=0.7))
    keep = draw.maybe(draw.bools(batch, length, p=0.1))
    return scores, per_row, k, candidates, keep, threshold, width


def select_diverse(draw, batch, length, shape=None):
    channels, rule = shape or (draw.any(*DIMS), draw.any("maxmin", "dpp"))
    features = draw.normal(batch, length, channels)
    if draw.any(True, False):  # copies, rows of zeros, odd ones, and some that need be scaled
        features[:, 1::5] = features[:, :1].clone()
        features[:, 2::9], features[:, 3::7, -1] = 0.0, draw.any(torch.inf, torch.nan)
        features[:, 4:6] *= 1.0 if draw.dtype == torch.float16 else draw.any(2.0**99, 2.0**-99)
    candidates = draw.maybe(draw.bools(batch, length, p=0.8))
    keep = draw.maybe(draw.bools(batch, length, p=0.1))
    relevance = draw.normal(batch, length, dtype=torch.float32) if rule == "dpp" else None
    few = selection(draw, batch, min(length, 16))
    per_row, k, _, width = few if shape is None else (None, 9, None, length)
    first = draw.any(-1, length - 1) if rule == "maxmin" else -1
    return features, per_row, k, rule, draw.maybe(relevance), candidates, keep, first, width


def token_contribution(draw, batch, length):
    (heads, kv_heads), dim = draw.any(*HEADS), draw.any(*DIMS)
    if length in LONG["token_contribution"]:
        heads, kv_heads, dim = 40, 5, 136  # more heads than are compared at a time
    valid = draw.maybe(draw.bools(batch, length, p=0.8))
    query = draw.normal(batch, heads, dim)
    pair = [keys(draw, batch, kv_heads, length, dim, valid) for _ in range(2)]
    return query, *pair, draw.bools(batch, length, p=0.8), valid, dim**-0.5


def passive_attention(draw, batch, length):
    (heads, kv_heads), dim = draw.any(*HEADS), draw.any(*DIMS)
    valid = draw.maybe(draw.bools(batch, length, p=0.8))
    query = draw.normal(batch, heads, length, dim)
    pair = [keys(draw, batch, kv_heads, length, dim, valid) for _ in range(2)]
    return (
        *(query, *pair, draw.bools(batch, length), valid, draw.any("merge", "drop")),
        *(draw.any("prefix", "causal", "skip"), draw.any(True, False), dim**-0.5),
    )


def knee(draw, length):
    """The options of `inflection`."""
    return (
        draw.any("chord", "kneedle", "iqr", "mass"),
        draw.any(0, 1, 5),
        draw.any(None, 0, 3, length),
        draw.any(1.0, 0.9),
        1.0,
        0.9,
    )


def inflection(draw, batch, length):
    curve = draw.normal(batch, length)
    if draw.any(True, False):
        curve[draw.bools(batch, length, p=0.05)] = draw.any(torch.inf, torch.nan)
    return curve, *knee(draw, length)


def cls_inflection(draw, batch, length):
    channels = draw.any(*DIMS)
    features, cls = draw.normal(batch, length, channels), draw.normal(batch, channels)
    return features, cls, *knee(draw, length)


def compact_kv(draw, batch, length):
    layers, heads = draw.any(1, 2, 40), draw.any(1, 3)
    dim = draw.any(1, 8, 9) if layers == 40 else draw.any(*DIMS)
    sides = [[draw.normal(batch, heads, length, dim) for _ in range(layers)] for _ in range(2)]
    width = draw.any(0, 1, length // 2, length)
    per = draw.any((), (layers,), (layers, heads))  # indices for all, for each layer, each head
    if per == (layers, heads):
        drawn = [draw.rows(batch * heads, length, width) for _ in range(layers)]
        indices = torch.stack([rows.view(batch, heads, width) for rows, _ in drawn])
        counts = torch.stack([counts.int().view(batch, heads) for _, counts in drawn])
    elif per == (layers,):
        drawn = [draw.rows(batch, length, width) for _ in range(layers)]
        indices = torch.stack([rows for rows, _ in drawn])
        counts = torch.stack([counts.int() for _, counts in drawn])
    else:
        indices, counts = draw.rows(batch, length, width)
    return *sides, indices, counts


def compact_rows(draw, batch, length):
    tensors = [draw.normal(batch, length, draw.any(*DIMS)), draw.bools(batch, length)]
    tensors.append(draw.integers(9, batch, length, dtype=draw.any(torch.int64, torch.uint8)))
    indices, counts = draw.rows(batch, length, draw.any(0, 1, length // 2, length))
    return tensors, indices, counts, draw.any("left", "right")


def targets(draw, batch, length):
    """Different rows in any order, and what counts as padding."""
    width = draw.any(0, 1, 5, 70, length)
    rows = torch.full((batch, width), draw.any(-1, -(2**40), 2**40))
    for row in rows:
        chosen = torch.randperm(length, generator=draw.generator)[: draw.any(width, width // 2)]
        row[torch.randperm(width, generator=draw.generator)[: len(chosen)]] = chosen
    return laid_out(rows, draw.layout)


def assign_rows(draw, batch, length, dim=None):
    keys = draw.normal(batch, length, dim or draw.any(*DIMS))
    keys[draw.bools(batch, length, p=0.1)] = draw.any(0.0, torch.nan, torch.inf)
    return keys, targets(draw, batch, length), draw.maybe(draw.bools(batch, length, p=0.8))


def merge_rows(draw, batch, length, rows=None):
    rows = targets(draw, batch, length) if rows is None else rows
    assignment = draw.integers(rows.shape[1] + 3, batch, length)
    assignment.sub_(1)
    mode = draw.any("mean", "add_mean", "weighted")
    weights = draw.normal(batch, length, dtype=torch.float32).abs_()
    features = draw.normal(batch, length, draw.any(*DIMS))
    return features, assignment, rows, weights if mode == "weighted" else None, mode


OPS = {
    "assign_rows": assign_rows,
    "attention_scores": attention,
    "attention_topk": attention_topk,
    "select_topk": select_topk,
    "select_diverse": select_diverse,
    "token_contribution": token_contribution,
    "passive_attention": passive_attention,
    "inflection": inflection,
    "cls_inflection": cls_inflection,
    "compact_kv": compact_kv,
    "compact_kv_": compact_kv,
    "compact_rows": compact_rows,
    "merge_rows": merge_rows,
}
# Ops that have other kernels before sm_90, which knows clusters.
ARCHITECTURES = {"attention_topk": (90, 80), "select_diverse": (90, 80), "select_topk": (90, 80)}
# What sm_90 has: rows of inflection that are sorted there are sorted elsewhere on other devices.
SHARED_BYTES = 227 << 10
# Rows that take the ways for long ones.
LONG = {
    "assign_rows": (600,),
    "attention_scores": (600,),
    "attention_topk": (600, 3000),
    "select_topk": (600, 5000, 70000),
    "inflection": (600, 5000, 10000, 70000),
    "cls_inflection": (3000,),
    "token_contribution": (600,),
    "compact_rows": (600,),
    "merge_rows": (600,),
}
# More targets than have counters in shared memory.
MANY_TARGETS = 1540
# Rows of two heads, three tiles on two of keys, for warpgroups: one sum, or one a head.
PACKED = ((torch.bfloat16, "mean"), (torch.float16, "max"))
# Where attention_topk on sm_90 does not finish in clusters, though its kernels overlap: batches of
# more rows than run at once, and what is attention_scores and select_topk, by a block, by a cluster
# and of a row read anew in each sweep. Batch, length, and (heads, dim, rows).
BESIDE_CLUSTERS = (
    (17, 33, ((4, 2), 1, 1)),
    (1, 9, ((40, 40), 1, 16)),
    (1, 4100, ((8, 8), 1, 16)),
    (1, 16400, ((1, 1), 1, 1)),
)

# Where select_diverse has a matrix, and where it has none. Batch, length, (channels, rule) and
# architecture.
MATRICES = (
    (1, 130, (40, "maxmin"), 90),
    (1, 130, (40, "dpp"), 90),
    (1, 70, (40, "dpp"), 80),
    (1, 70, (8, "maxmin"), 90),
    (1, 70, (8, "maxmin"), 80),
    (1, 70, (8, "dpp"), 90),
)


def cases(op: str, seed: int) -> Iterator[Case]:
    """The op's cases; made anew by each call, equal for equal seeds."""
    draw = Draw(seed)
    sizes = [(2, draw.any(*LENGTHS), dtype, x) for dtype in DTYPES for x in LAYOUTS]
    if op == "select_diverse":  # its work grows with the square of the length
        sizes = [(2, draw.any(1, 7, 64, 65), draw.any(*DTYPES), x) for x in LAYOUTS]
    sizes += [(0, 7, torch.float32, "dense"), (2, 0, draw.any(*DTYPES), "dense")]
    sizes += [(1, length, draw.any(*DTYPES), "dense") for length in LONG.get(op, ())]
    for architecture in ARCHITECTURES.get(op, (90,)):
        for batch, length, draw.dtype, draw.layout in sizes:
            text = f"{draw.dtype} {draw.layout} batch {batch} length {length} sm_{architecture}"
            yield Case(op, text, OPS[op](draw, batch, length), architecture)
    for draw.dtype, reduce in PACKED if op == "attention_scores" else ():
        draw.layout = draw.any(*LAYOUTS)
        *most, _ = attention(draw, 1, 140, ((2, 1), 72, 84))
        text = f"{draw.dtype} {draw.layout} packed rows, {reduce} sm_90"
        yield Case(op, text, (*most, reduce), 90)
    draw.dtype, draw.layout = draw.any(*DTYPES[:2]), "dense"
    if op == "assign_rows":  # enough rows for larger tiles
        rows = torch.cat([targets(draw, 100, 9), torch.full((100, 65), -1)], 1)
        yield Case(op, f"{draw.dtype} batch 100 sm_90", (draw.normal(100, 9, 8), rows, None), 90)
    if op == "merge_rows":
        rows = torch.full((1, MANY_TARGETS), -1)
        rows[0, ::400] = torch.tensor([3, 8, 0, 5])
        text = f"{draw.dtype} {MANY_TARGETS} targets sm_90"
        yield Case(op, text, merge_rows(draw, 1, 60, rows), 90)
    draw.dtype = draw.any(*DTYPES)
    for batch, length, shape in BESIDE_CLUSTERS if op == "attention_topk" else ():
        text = f"{draw.dtype} {shape} batch {batch} length {length} sm_90"
        yield Case(op, text, attention_topk(draw, batch, length, shape), 90)
    for batch, length, shape, architecture in MATRICES if op == "select_diverse" else ():
        text = f"{draw.dtype} {shape} batch {batch} length {length} sm_{architecture}"
        yield Case(op, text, select_diverse(draw, batch, length, shape), architecture)


def run(kernels, case: Case) -> list[Tensor]:
    """The tensors the emulated op returns or, if it returns none, has changed."""
    with build.architecture(kernels, case.architecture):
        result = getattr(torch.ops.vtp_kernels_emulated, case.op)(*case.arguments)
    if result is None:
        keys, values, *_ = case.arguments
        return [*keys, *values]
    return [result] if isinstance(result, Tensor) else list(result)


def main(variant: str, seed: str, *ops: str) -> None:
    kernels = build.load(variant)
    kernels.set_shared_limit(SHARED_BYTES)
    for op in ops or OPS:
        for case in cases(op, int(seed)):
            print(case.op, case.text, flush=True)  # the last one said is the one that failed
            run(kernels, case)


if __name__ == "__main__":
    main(*sys.argv[1:])
