"""How many rows each prompt of a batch has: on the host, or on the device alone.

A method that knows its counts beforehand leaves them as a list, and nothing waits. One whose counts
depend on the picture may leave them on the device; whoever needs the numbers there waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Counts", "added", "less", "moved", "on_device", "on_host"]

Counts = list[int] | Tensor
"""One number per prompt: a list where the host knows it, else an integer tensor [B]."""


def on_host(counts: Counts) -> list[int]:
    """The numbers themselves. Waits for the GPU if they are known there only."""
    return counts.tolist() if isinstance(counts, Tensor) else counts


def on_device(counts: list[int], device: torch.device) -> int | Tensor:
    """One number per prompt: as an int if they agree, else as int32 [B] on the device."""
    if all(count == counts[0] for count in counts):  # no set: sizes of compiled code have no hash
        return counts[0]
    # Copied without waiting for the GPU; compiled code has them there.
    pinned = device.type == "cuda" and not torch.compiler.is_compiling()
    tensor = torch.tensor(counts, dtype=torch.int32, pin_memory=pinned)
    return tensor.to(device, non_blocking=True)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting for it."""
    if device.type != "cuda":
        return x
    return (x if torch.compiler.is_compiling() else x.pin_memory()).to(device, non_blocking=True)


def less(counts: Counts, *others: int | Counts) -> Counts:
    """What is left of them, at least 0, where so many of each prompt are taken off."""
    for other in others:
        if isinstance(counts, Tensor) and isinstance(other, list):
            other = torch.tensor(other, device=counts.device)
        if isinstance(counts, Tensor):
            counts = (counts - other).clamp(min=0)
        else:
            taken = [other] * len(counts) if isinstance(other, int) else other
            counts = [max(a - b, 0) for a, b in zip(counts, taken, strict=True)]
    return counts


def added(a: Counts, b: Counts) -> list[int] | None:
    """The sums, or None where the host does not know both."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return None
    return [x + y for x, y in zip(a, b, strict=True)]
