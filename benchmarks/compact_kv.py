"""compact_kv beside one torch call per layer, for keys and values: gather, or index_select."""

import math

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal
from benchmarks.shapes import Shape, randn, shapes

LAYERS = 4  # of the 32 that a model has: the work is the same per layer


def gather(keys, values, indices):
    index = indices[:, None, :, None].expand(-1, keys[0].shape[1], -1, keys[0].shape[3])
    return tuple(x.gather(2, index) for x in keys), tuple(x.gather(2, index) for x in values)


def index_select(keys, values, indices):
    def select(x):
        return torch.stack([row.index_select(1, i) for row, i in zip(x, indices, strict=True)])

    return tuple(map(select, keys)), tuple(map(select, values))


def case(shape: Shape, share: int, device: str, layers: int = LAYERS) -> Case:
    kept = shape.length // share
    kv = (shape.batch, shape.kv_heads, shape.length, shape.dim)

    def make():
        keys, values = (
            [randn(*kv, dtype=shape.dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        scores = torch.rand(shape.batch, shape.length, device=device)
        return keys, values, scores.topk(kept).indices.sort().values

    moved = 4 * layers * math.prod(kv) // shape.length * kept * shape.dtype.itemsize
    return Case(
        "compact_kv",
        f"{shape}, keep 1/{share}, {layers} layers",
        moved,
        make,
        vtp.compact_kv,
        {"torch.gather": gather, "index_select": index_select},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    return [case(shape, share, device) for shape in shapes(device) for share in (2, 9)]
