"""Visual rows that leave a layer's KV cache once the prompt has been read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.contract.counts import Counts, on_device, on_host
from vtp_kernels.ops import compact_kv, select_topk

__all__ = ["Text", "forget_visual"]


class Text(NamedTuple):
    """The rows of a batch that are text: bool [B, S], and how many of each prompt."""

    rows: Tensor
    counts: Counts


def forget_visual(
    held: list[Any], text: Text, past: int, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Take all but `past` earlier keys and the text out of the layers `held` of a DynamicCache.

    Their keys are those of the past and of the rows of `text`. Returns which of their keys they
    still have, int64 [B, keys], and which of these only fill up a shorter prompt: bool [B, keys],
    or None.
    """
    stays = pad(text.rows, (past, 0), value=True)
    counts = on_host(text.counts)
    width = past + max(counts)
    # Prompts with less text keep something else in its place, so that all end together.
    fill = [width - past - count for count in counts]
    indices, _ = select_topk(
        torch.zeros(stays.shape, device=stays.device),
        on_device(fill, stays.device),
        candidates=~stays,
        keep=stays,
        capacity=width,
        backend=backend,
    )
    keys, values = compact_kv(
        [layer.keys for layer in held], [layer.values for layer in held], indices, backend=backend
    )
    for layer, key, value in zip(held, keys, values, strict=True):
        layer.keys, layer.values = key, value
    return indices, ~stays.gather(1, indices) if any(fill) else None
