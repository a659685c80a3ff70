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


MODELS = (  # visual tokens, heads, key heads
    ("LLaVA-1.5-7B", 576, 32, 32),
    ("LLaVA-NeXT-7B", 2880, 32, 32),
    ("LLaVA-NeXT-Mistral-7B", 2880, 32, 8),
    ("Qwen2.5-VL-7B", 7168, 28, 4),
)
BATCHES = (1, 8, 32)
DTYPES = (torch.float32, torch.bfloat16)
CPU_BYTES = 400e6  # of one tensor [B, heads, S, dim] in float32, of which rivals make several


def of_model(name: str, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Shape:
    """A prompt of one of MODELS, with 64 tokens of text."""
    visual, heads, kv_heads = next(numbers for model, *numbers in MODELS if model == name)
    return Shape(name, batch, visual, 64, heads, kv_heads, 128, dtype)


def shapes(device: str) -> list[Shape]:
    """Every model at every batch size; on a CPU those that fit into a small machine's memory."""
    every = [
        of_model(name, batch, dtype) for dtype in DTYPES for name, *_ in MODELS for batch in BATCHES
    ]
    if torch.device(device).type != "cpu":
        return every
    return [x for x in every if 4 * x.batch * x.heads * x.length * x.dim <= CPU_BYTES]


def randn(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*size, device=device).to(dtype)


def visual_mask(shape: Shape, device: str) -> torch.Tensor:
    """bool [B, S]: the visual tokens stand first, the text behind them."""
    return (
        (torch.arange(shape.length, device=device) < shape.visual)
        .expand(shape.batch, -1)
        .contiguous()
    )
