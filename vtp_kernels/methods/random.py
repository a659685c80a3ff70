"""Random pruning: the baseline every method has to beat, and several published ones do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .schedule import ScheduledMethod, Stage, parse_keep

__all__ = ["RandomPruning"]


@dataclass(frozen=True)
class RandomPruning(ScheduledMethod, key="random"):
    """Before `layer` runs, keep visual tokens by chance.

    The choice depends on the seed and on how many visual tokens the prompt has, on nothing else: a
    prompt keeps the same tokens alone and in any batch, on any device.

    Parameters
    ----------
    layer : int
    keep : int | float
        Count, or share of the prompt's visual tokens.
    seed : int
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`.
    """

    layer: int = 0
    keep: int | float = 0.5
    seed: int = 0
    per: str = "prompt"
    score: ClassVar[str] = "random"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.keep, "RandomPruning.layer", "RandomPruning.keep"),)

    @classmethod
    def from_spec(cls, arguments: str) -> RandomPruning:
        """`KEEP[:LAYER[:SEED[:PER]]]`"""
        keep, *rest = arguments.split(":", 3)
        layer, seed = [*map(int, rest[:2]), *(0, 0)[len(rest) :]]
        return cls(layer, parse_keep(keep), seed, *rest[2:])
