"""Rivals from packages that only some machines have, on a GPU: FlashInfer and flash-attn."""

from collections.abc import Callable
from importlib.util import find_spec

import torch


def topk(device: str) -> dict[str, Callable]:
    """Label -> f(scores [B, N], k), the indices of the k largest, ascending."""
    if not _here("flashinfer", device):
        return {}
    import flashinfer

    return {"FlashInfer": lambda scores, k: flashinfer.top_k(scores, k)[1].sort(dim=1).values}


def causal_attention(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Label -> f(query [B, H, S, D], key, value [B, Hkv, S, D]); 16-bit dtypes only."""
    if dtype == torch.float32 or not _here("flash_attn", device):
        return {}
    from flash_attn import flash_attn_func

    def attend(query, key, value):
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attn_func(*rows, causal=True).transpose(1, 2)

    return {"flash-attn": attend}


def _here(package: str, device: str) -> bool:
    return torch.device(device).type == "cuda" and find_spec(package) is not None
