"""select_topk beside torch: stable argsort, the first k, sorted back into their original order; and
topk, which leaves open who wins among equals, on scores of which no two are equal."""

import torch

import vtp_kernels as vtp
from benchmarks import installed
from benchmarks.harness import Case, assert_equal


def eager(scores, k):
    """Ties by smaller index, as `select_topk`: torch.topk promises no order among equals."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values


def topk(scores, k):
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def unequal(batch: int, length: int, device: str) -> torch.Tensor:
    """float32 [B, N]: softmax of as many different logits from 0 to 8."""
    rank = torch.rand(batch, length, device=device).argsort(1)
    return (rank * (8 / length)).softmax(1)


def case(batch: int, length: int, k: int, device: str) -> Case:
    return Case(
        "select_topk",
        f"B={batch}, N={length}, k={k}",
        batch * (4 * length + 8 * k),
        lambda: (unequal(batch, length, device), k),
        lambda scores, k: vtp.select_topk(scores, k).indices,
        {"torch eager": eager, "torch.topk": topk},
        assert_equal,
        installed.topk(device),
    )


def cases(device: str) -> list[Case]:
    return [
        case(batch, length, k, device)
        for batch in (1, 8, 32)
        for length, k in ((576, 64), (576, 288), (2880, 320), (10000, 1000))
    ]
