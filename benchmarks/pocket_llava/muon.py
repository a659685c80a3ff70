"""Muon with the products of its Newton-Schulz steps in a dtype of one's choice."""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # as Muon's authors and torch have them
STEPS = 5


def orthogonal(matrix: Tensor, dtype: torch.dtype, eps: float = 1e-7) -> Tensor:
    """Five Newton-Schulz steps: the same singular vectors, singular values near 1."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    if tall := matrix.shape[0] > matrix.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", and its bits if dtype is bfloat16.

    torch's always multiplies in bfloat16, and a CPU without instructions for it takes 40 times as
    long for that as for float32: nearly all the time of a training step.
    """

    def __init__(
        self,
        params: Iterable,
        dtype: torch.dtype,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonal(parameter.grad.lerp(average, momentum), self.dtype)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)
