"""merge_rows beside the ways to a mean by group in torch."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case
from benchmarks.shapes import randn


def index_add(features, assignment, targets):
    batch, length, width = features.shape
    count = targets.shape[1]
    rows = (assignment + torch.arange(batch, device=features.device)[:, None] * count).flatten()
    sums = torch.zeros(batch * count, width, device=features.device)
    sums.index_add_(0, rows, features.float().flatten(0, 1))
    ones = torch.ones(batch * length, device=features.device)
    sizes = torch.zeros(batch * count, device=features.device).index_add_(0, rows, ones)
    return (sums / sizes[:, None]).view(batch, count, width).to(features.dtype)


def scatter_reduce(features, assignment, targets):
    batch, _, width = features.shape
    means = torch.zeros(batch, targets.shape[1], width, device=features.device)
    index = assignment[..., None].expand(-1, -1, width)
    means.scatter_reduce_(1, index, features.float(), "mean", include_self=False)
    return means.to(features.dtype)


def one_hot_bmm(features, assignment, targets):
    """As VisionZip publishes it, in the dtype of the features."""
    members = torch.nn.functional.one_hot(assignment, targets.shape[1]).to(features.dtype)
    sizes = members.sum(1)[..., None]
    return torch.bmm(members.transpose(1, 2), features) / sizes


def check(ours, theirs) -> None:
    """Sums in bfloat16 stand among the rivals'."""
    exact = ours.dtype == torch.float32
    torch.testing.assert_close(
        ours, theirs, rtol=1e-4 if exact else 2e-2, atol=1e-5 if exact else 2e-2
    )


def case(batch: int, length: int, count: int, width: int, dtype, device: str) -> Case:
    def make():
        targets = torch.rand(batch, length, device=device).topk(count).indices
        assignment = torch.randint(0, count, (batch, length), device=device)
        own = torch.arange(count, device=device).expand(batch, -1)
        assignment = assignment.scatter(1, targets, own)
        features = randn(batch, length, width, dtype=dtype, device=device)
        return features, assignment, targets

    return Case(
        "merge_rows",
        f"mean, B={batch}, N={length}, T={count}, C={width}, {str(dtype).removeprefix('torch.')}",
        batch * ((length + count) * width * dtype.itemsize + 8 * (length + count)),
        make,
        vtp.merge_rows,
        {"index_add": index_add, "scatter_reduce": scatter_reduce, "one-hot bmm": one_hot_bmm},
        check,
    )


def cases(device: str) -> list[Case]:
    """Rows of a tower, and of the language model."""
    return [
        case(*sizes, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
        for sizes in (
            (1, 576, 30, 1024),
            (1, 576, 30, 4096),
            (8, 576, 30, 1024),
            (1, 2880, 160, 4096),
            (1, 7168, 400, 3584),
        )
    ]
