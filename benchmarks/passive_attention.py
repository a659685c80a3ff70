"""passive_attention beside eager attention whose weights are zeroed afterwards, as published, and
beside fused attention called twice: once with visual values of 0, for the text."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import vtp_kernels as vtp
from benchmarks import installed
from benchmarks.harness import Case
from benchmarks.shapes import Shape, randn, shapes, visual_mask


def eager(query, key, value, visual):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    length = key.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    logits = (query @ key.transpose(2, 3)).float() / math.sqrt(query.shape[-1])
    weights = logits.masked_fill(future, -math.inf).softmax(-1)
    dropped = ~visual[:, None, :, None] & visual[:, None, None, :]
    return weights.masked_fill(dropped, 0).to(value.dtype) @ value


def twice(attend: Callable) -> Callable:
    def attend_twice(query, key, value, visual):
        rows = visual[:, None, :, None]
        for_text = attend(query, key, value.masked_fill(rows, 0))
        return torch.where(rows, attend(query, key, value), for_text)

    return attend_twice


def rivals(shape: Shape) -> dict[str, Callable]:
    grouped = shape.heads != shape.kv_heads
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)
    return {"torch eager": eager, "SDPA twice": twice(sdpa)}


def guests(shape: Shape, device: str) -> dict[str, Callable]:
    found = installed.causal_attention(device, shape.dtype)
    return {f"{name} twice": twice(attend) for name, attend in found.items()}


def case(shape: Shape, device: str) -> Case:
    visual = visual_mask(shape, device)
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)

    def make():
        query = randn(shape.batch, shape.heads, *kv[2:], dtype=shape.dtype, device=device)
        key, value = (randn(*kv, dtype=shape.dtype, device=device) for _ in range(2))
        return query, key, value, visual

    def ours(query, key, value, visual):
        return vtp.passive_attention(
            query, key, value, visual=visual, sink="drop", visual_rows="causal"
        )

    tolerance = 1e-4 if shape.dtype == torch.float32 else 2e-2
    heads_read = 2 * shape.heads + 2 * shape.kv_heads
    return Case(
        "passive_attention",
        f"{shape}, drop, causal",
        shape.batch * heads_read * shape.length * shape.dim * shape.dtype.itemsize,
        make,
        ours,
        rivals(shape),
        lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance),
        guests(shape, device),
    )


# Of one matrix of weights, of which the rival makes several.
MATRIX_BYTES = {"cpu": 500e6, "cuda": 8e9}


def cases(device: str) -> list[Case]:
    most = MATRIX_BYTES[torch.device(device).type]
    return [
        case(shape, device)
        for shape in shapes(device)
        if 4 * shape.batch * shape.heads * shape.length**2 <= most
    ]
