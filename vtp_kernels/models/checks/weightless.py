"""Copies of modules that run without the weights of a model.

For what a module's code does with a few rows, whatever its weights are, and wherever: offloaded, in
pieces, quantized, on a GPU. A copy has the settings of its module and small random weights on the
CPU. None of the module's hooks, nor a forward put in front of its own, comes along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.unwrapping import own

__all__ = ["Copies", "InPlaceOf", "Projection", "Weighed"]

# What others put on a module to run in front of its forward.
PUT_ON = {"forward", "_hf_hook", "_old_forward"}


class Copies:
    """Makes copies, with random numbers of its own."""

    def __init__(self) -> None:
        self.random = torch.Generator("cpu").manual_seed(0)

    def of(self, module: nn.Module, children: Iterable[str] | None = None) -> nn.Module:
        """A copy with copies of the named children (None: of all); the others are those of the
        module."""
        copy = object.__new__(type(module))
        blank = vars(nn.Module())  # no hooks
        copy.__dict__.update({k: x for k, x in vars(module).items() if k not in PUT_ON})
        copy.__dict__.update(blank)
        copy.training = False
        for name, child in module._modules.items():
            copied = child is not None and (children is None or name in children)
            copy._modules[name] = self.of(own(child)) if copied else child
        for name, weight in module._parameters.items():
            copy._parameters[name] = None if weight is None else self._weights(weight.shape)
        for name, buffer in module._buffers.items():
            copy._buffers[name] = None if buffer is None else self._buffer(buffer)
        return copy

    def _weights(self, shape: torch.Size) -> nn.Parameter:
        """From 0.5 to 1.5. All rows of a matrix, which may be large, are the same."""
        row = 0.5 + torch.rand(shape[-1:], generator=self.random, device="cpu")
        return nn.Parameter(row.expand(shape), requires_grad=False)

    def _buffer(self, buffer: Tensor) -> Tensor:
        """Settings in the form of a tensor, as the frequencies of a rotary embedding."""
        if type(buffer) is Tensor and buffer.device.type != "meta":
            return buffer.detach().cpu()
        return torch.rand(buffer.shape, generator=self.random, device="cpu")


class InPlaceOf(nn.Module):
    """Calls `run` where a module of another would be called, and has that one's attributes."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(replaced=module, forward=run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["replaced"], name)


class Projection(nn.Module):
    """To `features`, from the first few numbers of a row: as good as any, and soon made."""

    INPUTS = 4

    def __init__(self, features: int, random: torch.Generator) -> None:
        super().__init__()
        self.out_features = features
        self.matrix = torch.randn(self.INPUTS, features, generator=random, device="cpu")

    def forward(self, rows: Tensor) -> Tensor:
        return rows[..., : self.INPUTS] @ self.matrix


class Weighed(nn.Module):
    """In the place of a projection of so many features whose output nobody needs: the features
    themselves, each times its own weight."""

    def __init__(self, features: int, random: torch.Generator) -> None:
        super().__init__()
        self.weights = 0.5 + torch.rand(features, generator=random, device="cpu")

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.weights
