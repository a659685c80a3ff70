"""The networks that decide: two blocks of cross-attention, from visual rows to the text (LVPruning,
arXiv 2501.13652, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["BLOCKS", "HEADS", "Decider", "Deciders", "Shape"]

HEADS = 8
BLOCKS = 2


@dataclass(frozen=True)
class Shape:
    """What the deciders of a model are made of.

    Attributes
    ----------
    hidden_size : int
        Width of the rows they look at.
    width : int
        Their own; the paper's is that of the rows.
    layers : tuple of int
        One decider for each of these decoder layers (0-based), which looks at what enters it.
    """

    hidden_size: int
    width: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.width < HEADS or self.width % HEADS:
            raise ValueError(
                f"width: deciders have {HEADS} heads, so their width is a multiple of {HEADS}; got "
                f"{self.width}"
            )

    def linear_macs(self, text: int, visual: int) -> int:
        """Multiply-accumulates of one decider's linear layers, for one prompt."""
        wide, narrow = self.hidden_size * self.width, self.width**2
        queries = wide + (BLOCKS - 1) * narrow  # the first block reads rows, the others a block
        other = BLOCKS * 5 * narrow + 2 * self.width  # o_proj and the FFN; the head
        return visual * (queries + other) + text * BLOCKS * 2 * wide

    def flops(self, text: int, visual: int) -> int:
        """FLOPs of one decider for one prompt, 2 per multiply-accumulate, attention included."""
        return 2 * (self.linear_macs(text, visual) + BLOCKS * 2 * visual * text * self.width)


class CrossAttentionBlock(nn.Module):
    """O = attention(Q, K, V) + Q, on the projected Q; then an FFN between two LayerNorms."""

    def __init__(self, query_size: int, text_size: int, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(query_size, width)
        self.k_proj = nn.Linear(text_size, width)
        self.v_proj = nn.Linear(text_size, width)
        self.o_proj = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, rows: Tensor, text: Tensor, text_valid: Tensor | None) -> Tensor:
        query = self.q_proj(rows)
        mask = None if text_valid is None else text_valid[:, None, None]
        attended = scaled_dot_product_attention(
            *map(_heads, (query, self.k_proj(text), self.v_proj(text))), attn_mask=mask
        )
        return self.ffn(self.o_proj(attended.transpose(1, 2).flatten(2)) + query)


class Decider(nn.Module):
    """Two logits for every visual row: to keep it, and to drop it.

    forward(visual [B, N, C], text [B, T, C], text_valid bool [B, T] or None) -> [B, N, 2]. Every
    prompt needs at least one row of text. A visual row's logits depend on it and on the text, not
    on other visual rows.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        sizes = [hidden_size] + [width] * (BLOCKS - 1)
        self.blocks = nn.ModuleList(CrossAttentionBlock(size, hidden_size, width) for size in sizes)
        self.head = nn.Linear(width, 2)

    def forward(self, visual: Tensor, text: Tensor, text_valid: Tensor | None) -> Tensor:
        for block in self.blocks:
            visual = block(visual, text, text_valid)
        return self.head(visual)


class Deciders(nn.Module):
    """All deciders of a model; `deciders[layer]` is the one before that layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleDict(
            {str(layer): Decider(shape.hidden_size, shape.width) for layer in shape.layers}
        )

    def __getitem__(self, layer: int) -> Decider:
        return self.layers[str(layer)]


def _heads(rows: Tensor) -> Tensor:
    """[B, N, width] -> [B, heads, N, width / heads]."""
    return rows.unflatten(2, (HEADS, -1)).transpose(1, 2)
