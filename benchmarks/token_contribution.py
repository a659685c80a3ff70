"""token_contribution beside the published arithmetic: every c_j = concat_h a[h, j] v[h, j]."""

import math

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case
from benchmarks.shapes import Shape, randn, shapes, visual_mask


def eager(query, key, value, candidates):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    logits = torch.einsum("bhd,bhsd->bhs", query.float(), key) / math.sqrt(query.shape[-1])
    parts = (logits.softmax(-1)[..., None] * value).transpose(1, 2).flatten(2)
    whole = parts.sum(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(whole - parts, whole, dim=-1)
    return cosine.masked_fill(~candidates, 1), parts.norm(dim=-1).masked_fill(~candidates, 0)


def case(shape: Shape, device: str) -> Case:
    candidates = visual_mask(shape, device)
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)

    def make():
        query = randn(shape.batch, shape.heads, shape.dim, dtype=shape.dtype, device=device)
        key, value = (randn(*kv, dtype=shape.dtype, device=device) for _ in range(2))
        return query, key, value, candidates

    def ours(query, key, value, candidates):
        return vtp.token_contribution(query, key, value, candidates=candidates)

    return Case(
        "token_contribution",
        str(shape),
        2 * math.prod(kv) * shape.dtype.itemsize,
        make,
        ours,
        {"torch eager": eager},
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5),
    )


def cases(device: str) -> list[Case]:
    return [case(shape, device) for shape in shapes(device)]
