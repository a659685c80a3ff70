"""The shapes that the benchmarks share: visual and text tokens of the models people run."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """One prefill: `visual` + `text` tokens, heads and head dimension of the language model."""

    name: str
    batch: int
    visual: int
    text: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return self.visual + self.text

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, B={self.batch}, {self.visual}+{self.text}, {dtype}"


def shapes(dtypes=(torch.float32, torch.bfloat16)) -> list[Shape]:
    """LLaVA-1.5 alone and in a batch, LLaVA-NeXT, and a grouped-query model with 7,168 tokens."""
    return [
        Shape(name, batch, visual, 64, heads, kv_heads, 128, dtype)
        for dtype in dtypes
        for name, batch, visual, heads, kv_heads in (
            ("LLaVA-1.5-7B", 1, 576, 32, 32),
            ("LLaVA-1.5-7B", 8, 576, 32, 32),
            ("LLaVA-NeXT-7B", 1, 2880, 32, 32),
            ("Qwen2.5-VL-7B", 1, 7168, 28, 4),
        )
    ]


def randn(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*size, device=device).to(dtype)


def visual_mask(shape: Shape, device: str) -> torch.Tensor:
    """bool [B, S]: the visual tokens stand first, the text behind them."""
    return (
        (torch.arange(shape.length, device=device) < shape.visual)
        .expand(shape.batch, -1)
        .contiguous()
    )
