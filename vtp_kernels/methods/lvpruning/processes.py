"""One training run in several processes, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]


class Processes:
    """All processes of this run; a single one where torchrun has not started more.

    Used in a `with` block: opens the process group that torchrun's environment describes, unless
    there is one already, and closes what it opened.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.opened = device, False
        self.rank, self.world = 0, 1

    def __enter__(self) -> Processes:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.opened = True
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, *_: object) -> None:
        if self.opened:
            dist.destroy_process_group()
            self.opened = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sum over processes, in place; one message for all tensors of a device and dtype."""
        tensors = list(tensors)
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()
