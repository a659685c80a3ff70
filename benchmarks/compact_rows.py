"""compact_rows beside gather or index_select: hidden states and the two rotary tables."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal
from benchmarks.shapes import Shape, randn, shapes


def gather(tensors, indices):
    return tuple(x.gather(1, indices[..., None].expand(-1, -1, x.shape[2])) for x in tensors)


def index_select(tensors, indices):
    return tuple(
        torch.stack([row.index_select(0, i) for row, i in zip(x, indices, strict=True)])
        for x in tensors
    )


def case(shape: Shape, share: int, device: str) -> Case:
    kept, hidden = shape.length // share, shape.heads * shape.dim
    widths = (hidden, shape.dim, shape.dim)

    def make():
        tensors = tuple(
            randn(shape.batch, shape.length, width, dtype=shape.dtype, device=device)
            for width in widths
        )
        scores = torch.rand(shape.batch, shape.length, device=device)
        return tensors, scores.topk(kept).indices.sort().values

    return Case(
        "compact_rows",
        f"{shape}, keep 1/{share}",
        2 * shape.batch * kept * sum(widths) * shape.dtype.itemsize,
        make,
        vtp.compact_rows,
        {"torch.gather": gather, "index_select": index_select},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    return [case(shape, share, device) for shape in shapes(device) for share in (2, 9)]
