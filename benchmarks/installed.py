"""Rivals from packages that some machines have, on a GPU: FlashInfer, flash-attn, flash-colsum.

Written after their documentation, and tried with stand-ins alone: the harness leaves out, and says
why, what turns out to be called otherwise or to find something else.
"""

from collections.abc import Callable
from importlib import import_module

import torch

# Where flash_attn_func(query, key, value, causal=True) of [B, S, H, D] is: the third generation,
# made for Hopper; the fourth; the second.
ATTENTION = {
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
    "flash-attn": "flash_attn",
}
why_not: dict[str, str] = {}  # module -> why it is no rival, of those that were looked for


def topk(device: str) -> dict[str, Callable]:
    """Label -> f(scores [B, N], k), the indices of the k largest, ascending."""
    flashinfer = _module("flashinfer", device)
    if not hasattr(flashinfer, "top_k"):
        return {}
    return {"FlashInfer": lambda scores, k: flashinfer.top_k(scores, k)[1].sort(dim=1).values}


def causal_attention(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Label -> f(query [B, H, S, D], key, value [B, Hkv, S, D]); 16-bit dtypes only."""
    if dtype == torch.float32:
        return {}
    found = {label: _module(name, device) for label, name in ATTENTION.items()}
    return {
        label: _heads_first(module.flash_attn_func)
        for label, module in found.items()
        if hasattr(module, "flash_attn_func")
    }


def _heads_first(flash_attn_func: Callable) -> Callable:
    def attend(query, key, value):
        rows = (x.transpose(1, 2) for x in (query, key, value))
        attended = flash_attn_func(*rows, causal=True)
        if isinstance(attended, tuple):  # with the logarithms of the sums behind it
            attended = attended[0]
        return attended.transpose(1, 2)

    return attend


def column_means(device: str, batch: int) -> dict[str, Callable]:
    """Label -> f(query [1, H, M, D], key, candidates, positions): what `attention_scores` finds for
    the last M rows. flash-colsum takes one prompt, and as many heads of keys as of queries."""
    flash_colsum = _module("flash_colsum", device) if batch == 1 else None
    if not hasattr(flash_colsum, "flash_colsum"):
        return {}
    sums = hasattr(flash_colsum, "flash_colmean")  # flash_colsum was the mean before that came

    def means(query, key, candidates, positions):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        columns = flash_colsum.flash_colsum(query, key, is_causal=True).float()
        if sums:
            columns = columns / (query.shape[1] * query.shape[2])
        return columns.masked_fill(~candidates, 0)

    return {"flash-colsum": means}


def _module(name: str, device: str):
    """The module, or None where it does not import: wheels for another torch may be there."""
    if torch.device(device).type != "cuda":
        return None
    try:
        return import_module(name)
    except Exception as error:  # whatever a package raises that finds this machine wanting
        why_not[name] = f"{type(error).__name__}: {error}"[:500]
        return None
