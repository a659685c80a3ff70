"""The rows of a batch without the padding between them.

Prompts of a batch that keep different numbers of rows are padded to the longest, and one that keeps
everything would hold up all others. But only attention and the KV cache need the batch: whatever
looks at each row by itself (norms, projections, the MLP: nearly all of a layer's work) can do with
the real rows, one behind the other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .counts import moved
from .shadow import Shadow

__all__ = ["Packing", "is_known_forward", "others_look_into"]

# Whose hooks take rows in any shape.
KNOWN = ("vtp_kernels", "transformers", "accelerate", "torch.distributed")


class Packing:
    """Between a batch of B prompts, W rows wide, and its N real rows: the last ones of each prompt.

    Parameters
    ----------
    counts : real rows of each prompt
    width : W
    device : of the tensors to come
    """

    #: Moving rows costs a few copies of them in every layer, so there must be this much padding.
    LEAST_PADDING = 0.2

    def __init__(self, counts: list[int], width: int, device: torch.device) -> None:
        self.batch = len(counts)
        ends = range(width, (self.batch + 1) * width, width)
        rows = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        real = torch.arange(width) >= width - torch.tensor(counts)[:, None]
        places = (real.flatten().cumsum(0) - 1).clamp(min=0)
        self.rows = moved(torch.cat(rows), device)  # int64 [N]
        self.places = moved(places, device)  # int64 [B * W]

    @classmethod
    def of(cls, counts: list[int], width: int, device: torch.device) -> Packing | None:
        """None where there is too little padding to be worth it."""
        if sum(counts) > (1 - cls.LEAST_PADDING) * len(counts) * width:
            return None
        return cls(counts, width, device)

    def pack(self, rows: Tensor) -> Tensor:
        """[B, W, ...] as [1, N, ...]"""
        return rows.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, rows: Tensor) -> Tensor:
        """[1, N, ...] as [B, W, ...]; padding is a copy of some real row."""
        return rows[0].index_select(0, self.places).unflatten(0, (self.batch, -1))


def others_look_into(layer: nn.Module, shadow: Shadow) -> bool:
    """Whether anybody has hooks in a decoder layer, or a forward of their own, that would see
    packed rows where they expect a batch. `shadow` stands in front of the forward of its attention.
    (Hooks behind the layer are shown the batch.)"""
    if not shadow.first or not _is_known(shadow.module, shadow.before):
        return True  # somebody has put something in front of the attention, or had before
    for module in layer.modules():
        hooks = [*module._forward_pre_hooks.values()]
        if module is not layer:
            hooks += module._forward_hooks.values()
        if not all(map(_is_of_known, hooks)):
            return True
        forward = vars(module).get("forward")
        if forward is not shadow and not _is_known(module, forward):
            return True
    return False


def is_known_forward(module: nn.Module) -> bool:
    """Whether nobody has given a module a forward of their own."""
    return _is_known(module, vars(module).get("forward"))


def _is_known(module: nn.Module, forward: Any) -> bool:
    """Whether a module's own attribute `forward` is none, the method of its class, or accelerate's,
    which moves weights and inputs between devices."""
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is None or own or hasattr(module, "_hf_hook")


def _is_of_known(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    name = getattr(hook, "__module__", None) if owner is None else type(owner).__module__
    return (name or "").startswith(KNOWN)
