"""select_topk beside torch: stable argsort, the first k, sorted back into their original order."""

import torch

import vtp_kernels as vtp
from benchmarks.harness import Case, assert_equal


def eager(scores, k):
    """Ties by smaller index, as `select_topk`: torch.topk promises no order among equals."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values


def case(batch: int, length: int, k: int, device: str) -> Case:
    return Case(
        "select_topk",
        f"B={batch}, N={length}, k={k}",
        batch * (4 * length + 8 * k),
        lambda: (torch.rand(batch, length, device=device).softmax(1), k),
        lambda scores, k: vtp.select_topk(scores, k).indices,
        {"torch eager": eager},
        assert_equal,
    )


def cases(device: str) -> list[Case]:
    return [
        case(batch, length, k, device)
        for batch in (1, 8, 32)
        for length, k in ((576, 64), (576, 288), (2880, 320), (10000, 1000))
    ]
