"""attention_topk beside eager attention and a stable argsort, for the last prompt token
(FastV), or for more rows."""

import math

import torch

import vtp_kernels as vtp
from benchmarks.attention_scores import eager as eager_scores
from benchmarks.harness import Case, assert_equal, assert_same_choice
from benchmarks.select_topk import eager as eager_topk
from benchmarks.shapes import Shape, randn, shapes, visual_mask


def case(shape: Shape, device: str, rows: int = 1) -> Case:
    candidates = visual_mask(shape, device)
    positions = torch.arange(shape.length - rows, shape.length, device=device)
    positions = positions.expand(shape.batch, -1).contiguous()
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)
    k = shape.visual // 9

    def make():
        query = randn(shape.batch, shape.heads, rows, shape.dim, dtype=shape.dtype, device=device)
        return query, randn(*kv, dtype=shape.dtype, device=device)

    def ours(query, key):
        asked = {} if rows == 1 else {"query_positions": positions}
        selection, scores = vtp.attention_topk(query, key, k, candidates=candidates, **asked)
        return selection.indices, scores

    def eager(query, key):
        scores = eager_scores(query.float(), key.float(), candidates, positions)
        return best(scores), scores

    def best(scores):
        return eager_topk(scores.masked_fill(~candidates, -math.inf), k)

    def check(ours, theirs):
        """The best by the very scores that came back, and but for near-ties the rival's choice."""
        indices, scores = ours
        assert_equal(indices, best(scores))
        assert_same_choice(ours, theirs)

    return Case(
        "attention_topk",
        f"{shape}, k={k}" + (f", M={rows}" if rows > 1 else ""),
        math.prod(kv) * shape.dtype.itemsize,
        make,
        ours,
        {"torch eager": eager},
        check,
    )


def cases(device: str) -> list[Case]:
    return [case(shape, device) for shape in shapes(device)]
