"""assign_rows beside what merging methods publish: normalised keys, a batched product, argmax."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal
from benchmarks.shapes import randn


def eager(keys, targets):
    unit = torch.nn.functional.normalize(keys, dim=-1)
    target = unit.gather(1, targets[..., None].expand(-1, -1, keys.shape[2]))
    return torch.bmm(unit, target.transpose(1, 2)).argmax(-1)


def clustered(batch: int, length: int, count: int, width: int, dtype, device: str):
    """Keys near one of `count` directions each, and a row of each direction as the targets: what is
    nearest is plain in any dtype."""
    directions = torch.randn(batch, count, width, device=device)
    nearest = torch.arange(length, device=device).remainder(count).expand(batch, -1)
    keys = directions.gather(1, nearest[..., None].expand(-1, -1, width))
    keys = keys + randn(batch, length, width, dtype=torch.float32, device=device) / 8
    targets = torch.arange(count, device=device).expand(batch, -1).contiguous()
    return keys.to(dtype), targets


def case(batch: int, length: int, count: int, width: int, dtype, device: str) -> Case:
    return Case(
        "assign_rows",
        f"B={batch}, N={length}, T={count}, D={width}, {str(dtype).removeprefix('torch.')}",
        batch * (length * width * dtype.itemsize + 8 * (length + count)),
        lambda: clustered(batch, length, count, width, dtype, device),
        vtp.assign_rows,
        {"normalize, bmm, argmax": eager},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    """VisionZip's targets at LLaVA-1.5, and as many a row beyond it; keys are a mean over heads, or
    whole rows of a tower."""
    return [
        case(*sizes, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
        for sizes in (
            (1, 576, 30, 64),
            (1, 576, 10, 1024),
            (1, 576, 30, 1024),
            (8, 576, 30, 1024),
            (1, 2880, 160, 1024),
            (1, 7168, 400, 1280),
        )
    ]
