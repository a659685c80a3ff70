"""Which backend runs an op in a model, asked once for every kind of tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_kernels.ops._dispatch import choose

__all__ = ["Backends"]


class Backends:
    """`asked` is the backend that a method was applied with, or None. Choosing takes longer than
    some ops do."""

    def __init__(self, asked: str | None) -> None:
        self.asked = asked
        self._chosen: dict[tuple[str, torch.dtype, torch.device], str] = {}

    def of(self, op: str, x: Tensor) -> str:
        """As `choose`, and what it raises."""
        if torch.compiler.is_compiling():  # once; what is noted meanwhile would have it done again
            return choose(op, x, self.asked)
        key = op, x.dtype, x.device
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = choose(op, x, self.asked)
        return chosen
