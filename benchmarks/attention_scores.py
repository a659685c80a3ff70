"""attention_scores beside eager attention: softmax(Q K^T) of the last token or the text."""

import math

import torch

import vtp_kernels as vtp
from benchmarks import installed
from benchmarks.harness import Case
from benchmarks.shapes import Shape, randn, shapes, visual_mask


def eager(query, key, candidates, positions):
    """What the pruning papers' code does: the attention rows, in full, over repeated heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(2, 3)).float() / math.sqrt(query.shape[-1])
    hidden = torch.arange(key.shape[2], device=key.device) > positions[:, None, :, None]
    weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
    return weights.mean((1, 2)).masked_fill(~candidates, 0)


def case(shape: Shape, rows: int, device: str) -> Case:
    candidates = visual_mask(shape, device)
    positions = torch.arange(shape.length - rows, shape.length, device=device).expand(
        shape.batch, -1
    )
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)

    def make():
        query = randn(shape.batch, shape.heads, rows, shape.dim, dtype=shape.dtype, device=device)
        return query, randn(*kv, dtype=shape.dtype, device=device), candidates, positions

    def ours(query, key, candidates, positions):
        return vtp.attention_scores(
            query, key, candidates=candidates, query_positions=positions.contiguous()
        )

    size = shape.dtype.itemsize
    moved = math.prod(kv) * size + shape.batch * (shape.heads * rows * shape.dim * size)
    tolerance = (
        1e-5 if shape.dtype == torch.float32 else 1e-2
    )  # the rival rounds its logits to bfloat16
    return Case(
        "attention_scores",
        f"{shape}, M={rows}",
        moved + 4 * candidates.numel(),
        make,
        ours,
        {"torch eager": eager},
        lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=tolerance),
        installed.column_means(device, shape.batch),
    )


def cases(device: str) -> list[Case]:
    return [case(shape, rows, device) for shape in shapes(device) for rows in (1, 32, 100)]
