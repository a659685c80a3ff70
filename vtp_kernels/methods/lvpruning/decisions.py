"""Decisions that can be learned: drawn hard, with the gradient of soft ones (LVPruning, arXiv
2501.13652, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .deciders import Deciders

__all__ = ["Choosing", "Sides", "gumbel_keep", "gumbel_noise"]


@dataclass(frozen=True)
class Sides:
    """Which rows of a batch are looked at, and what they are judged by.

    visual_at int64 [B, N], visual_valid bool [B, N]: the visual rows, unused places last.
    text_at int64 [B, T], text_valid bool [B, T]: the text that decides.
    """

    visual_at: Tensor
    visual_valid: Tensor
    text_at: Tensor
    text_valid: Tensor

    @classmethod
    def of(cls, visual: Tensor, text: Tensor) -> Sides:
        """From masks bool [B, S]."""
        return cls(*_places(visual), *_places(text))

    def to(self, device: torch.device) -> Sides:
        return Sides(*(x.to(device) for x in vars(self).values()))


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of True in each row, ascending, and which of these places are used."""
    counts = mask.sum(1)
    width = int(counts.max())
    order = mask.logical_not().long().argsort(dim=1, stable=True)[:, :width]
    return order, torch.arange(width, device=mask.device) < counts[:, None]


def gumbel_noise(seed: int, step: int, sample: int, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise that belongs to one sample of one step, float32 on the CPU.

    A step draws the same noise however its samples are spread over processes and micro-batches,
    and whatever was trained before: nothing of it has to be stored to go on from a checkpoint.
    """
    # 64 bits for the three, by an odd multiplier each, so that neighbours are far apart.
    mixed = (
        seed * 0x9E37_79B9_7F4A_7C15 + step * 0xBF58_476D_1CE4_E5B9 + sample * 0x94D0_49BB_1331_11EB
    )
    generator = torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & 0x7FFF_FFFF_FFFF_FFFF)
    uniform = torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    return -(-uniform.log()).log()


def gumbel_keep(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """1 where "keep" [..., 0] wins over "drop" [..., 1], else 0; float32 [...].

    The gradient is that of the softmax of (logits + noise) / temperature: straight-through.
    """
    soft = ((logits.float() + noise) / temperature).softmax(-1)[..., 0]
    hard = (soft > 0.5).float()
    return hard - soft.detach() + soft


class Choosing:
    """What the deciders say in one forward pass, layer by layer; given to a `MaskedRun`.

    A row that was dropped stays dropped. `kept` has the decisions so far, float [B, N] a layer.
    """

    def __init__(
        self, deciders: Deciders, sides: Sides, noise: Mapping[int, Tensor], temperature: float
    ) -> None:
        self.deciders, self.sides, self.noise = deciders, sides, noise
        self.temperature = temperature
        self.kept: list[Tensor] = []

    def decide(self, layer: int, hidden: Tensor) -> Tensor:
        """The policy float [B, S] for what enters `layer`, hidden [B, S, C]."""
        sides = self.sides
        # The rows of a frozen bfloat16 model meet deciders in float32.
        rows = hidden.to(next(self.deciders.parameters()).dtype)
        visual, text = (_take(rows, at) for at in (sides.visual_at, sides.text_at))
        logits = self.deciders[layer](visual, text, sides.text_valid)
        kept = gumbel_keep(logits, self.noise[layer], self.temperature)
        if self.kept:
            kept = kept * self.kept[-1]
        self.kept.append(kept)
        # Unused places name rows that are not visual: they go to one more column, and away.
        length = hidden.shape[1]
        columns = torch.where(sides.visual_valid, sides.visual_at, length)
        policy = kept.new_ones(len(kept), length + 1).scatter(1, columns, kept)
        return policy[:, :length]

    def ratio_losses(self, ratios: tuple[float, ...]) -> Tensor:
        """(ratio - share kept)^2 of each prompt, mean over layers: float32 [B]."""
        losses = [(ratio - share) ** 2 for ratio, share in zip(ratios, self.shares(), strict=True)]
        return torch.stack(losses).mean(0)

    def shares(self) -> list[Tensor]:
        """The share of its visual tokens that each prompt keeps, float32 [B] a layer."""
        valid = self.sides.visual_valid
        return [(kept * valid).sum(1) / valid.sum(1) for kept in self.kept]


def _take(rows: Tensor, at: Tensor) -> Tensor:
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))
