"""Calls of every op with Triton: what there is to compile."""

from collections.abc import Callable, Iterator

import torch

import vtp_kernels as vtp
from vtp_kernels import _native, _triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


BATCH, LENGTH = 2, 576


def mask(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


def attention(dtype, batch, length, heads=8, kv_heads=2, rows=3, dim=128):
    return {
        "query": torch.zeros(batch, heads, rows, dim, dtype=dtype),
        "key": torch.zeros(batch, kv_heads, length, dim, dtype=dtype),
        "candidates": mask(batch, length),
    }


def attention_scores(dtype, batch, length):
    yield attention(dtype, batch, length)
    yield attention(dtype, batch, length, heads=32, kv_heads=32, rows=1)
    yield attention(dtype, batch, length, dim=64) | {
        "valid": mask(batch, length),
        "query_positions": torch.zeros(batch, 3, dtype=torch.int64),
        "query_valid": mask(batch, 3),
        "support": "candidates",
        "head_reduce": "max",
    }
    yield attention(dtype, batch, length, dim=256) | {"lse": torch.zeros(batch, 8, 3)}


def attention_topk(dtype, batch, length):
    for arguments in attention_scores(dtype, batch, length):
        yield arguments | {"k": length // 9}


def select_topk(dtype, batch, length):
    scores = torch.zeros(batch, length, dtype=dtype)
    yield {"scores": scores, "k": length // 9}
    yield {
        "scores": scores,
        "k": torch.zeros(batch, dtype=torch.int32),
        "capacity": length // 9,
        "candidates": mask(batch, length),
        "keep": mask(batch, length),
        "threshold": 0.5,
    }


def token_contribution(dtype, batch, length):
    for heads, kv_heads, dim in ((32, 32, 128), (8, 2, 64), (8, 1, 256)):
        arguments = attention(dtype, batch, length, heads, kv_heads, 1, dim)
        arguments["query"] = arguments["query"][:, :, 0]
        arguments["value"] = arguments["key"]
        yield arguments if dim == 128 else arguments | {"valid": mask(batch, length)}


def passive_attention(dtype, batch, length):
    for heads, dim, options in (
        (8, 128, {}),
        (2, 64, {"visual_rows": "causal", "sink": "drop", "valid": mask(batch, length)}),
        (2, 256, {"visual_rows": "skip", "renormalize": True}),
    ):
        arguments = attention(dtype, batch, length, heads, 2, length, dim)
        visual = arguments.pop("candidates")
        yield arguments | {"value": arguments["key"], "visual": visual} | options


def compact_kv(dtype, batch, length):
    layers = [torch.zeros(batch, 4, length, 128, dtype=dtype) for _ in range(4)]
    width = length // 9
    indices = torch.arange(width).expand(batch, width)
    for in_place in (False, True):
        yield {
            "keys": layers[:2],
            "values": layers[2:],
            "indices": indices,
            "counts": torch.full((batch,), width),
            "in_place": in_place,
        }
        yield {
            "keys": layers[:2],
            "values": layers[2:],
            "indices": indices[None, :, None].expand(2, batch, 4, width),
            "in_place": in_place,
        }


def compact_rows(dtype, batch, length):
    width = length // 9
    indices = torch.arange(width).expand(batch, width)
    tensors = [
        torch.zeros(batch, length, 64, dtype=dtype),
        torch.zeros(batch, length, dtype=torch.bool),
    ]
    yield {"tensors": tensors, "indices": indices}
    yield {
        "tensors": tensors,
        "indices": indices,
        "counts": torch.full((batch,), width),
        "align": "right",
    }


def inflection(dtype, batch, length):
    curve = torch.zeros(batch, length, dtype=dtype)
    yield {"curve": curve}
    yield {"curve": curve, "max_keep": length // 9, "min_keep": 1}
    yield from ({"curve": curve, "rule": rule} for rule in ("kneedle", "iqr", "mass"))


def cls_inflection(dtype, batch, length):
    for channels in (1024, 100):
        features = torch.zeros(batch, length, channels, dtype=dtype)
        yield {"features": features, "cls": torch.zeros(batch, channels, dtype=dtype)}


OPS = {
    "attention_scores": attention_scores,
    "attention_topk": attention_topk,
    "select_topk": select_topk,
    "token_contribution": token_contribution,
    "passive_attention": passive_attention,
    "compact_kv": compact_kv,
    "compact_rows": compact_rows,
    "inflection": inflection,
    "cls_inflection": cls_inflection,
}
assert set(OPS) | {"compact_kv_"} | _triton.WITHOUT == set(_native.OPS)


def of(
    op: str, dtypes=DTYPES, batch: int = BATCH, length: int = LENGTH
) -> Iterator[Callable[[], object]]:
    """Calls of an op, for what it can be asked; to be made under `ahead_of_time.gpu`."""
    for dtype in dtypes:
        for arguments in OPS[op](dtype, batch, length):
            yield lambda arguments=arguments: getattr(vtp, op)(**arguments, backend="triton")
