"""attention_topk beside eager attention and a stable argsort, for the last prompt token (FastV)."""

import math

import torch

import vtp_kernels as vtp
from benchmarks.attention_scores import eager as eager_scores
from benchmarks.harness import Case, assert_equal
from benchmarks.select_topk import eager as eager_topk
from benchmarks.shapes import Shape, randn, shapes, visual_mask


def case(shape: Shape, device: str) -> Case:
    candidates = visual_mask(shape, device)
    last = torch.full((shape.batch, 1), shape.length - 1, device=device)
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)
    k = shape.visual // 9

    def make():
        query = randn(shape.batch, shape.heads, 1, shape.dim, dtype=shape.dtype, device=device)
        return query, randn(*kv, dtype=shape.dtype, device=device)

    def ours(query, key):
        return vtp.attention_topk(query, key, k, candidates=candidates)[0].indices

    def eager(query, key):
        scores = eager_scores(query.float(), key.float(), candidates, last)
        return eager_topk(scores.masked_fill(~candidates, -math.inf), k)

    return Case(
        "attention_topk",
        f"{shape}, k={k}",
        math.prod(kv) * shape.dtype.itemsize,
        make,
        ours,
        {"torch eager": eager},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    return [case(shape, device) for shape in shapes(device)]
