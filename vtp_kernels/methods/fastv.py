"""FastV (arXiv 2403.06764): one early cut, ranked by the last token's attention."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import ScheduledMethod, Stage, parse_keep

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(ScheduledMethod, key="fastv"):
    """Before `layer` runs, keep the visual tokens that the last prompt token attends to most.

    Parameters
    ----------
    layer : int
        At least 1: the ranking is the attention of layer - 1, mean over heads.
    keep : int | float
        Count, or share of the prompt's visual tokens.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`.
    """

    layer: int = 2
    keep: int | float = 0.5
    per: str = "prompt"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.keep, "FastV.layer", "FastV.keep"),)

    @classmethod
    def from_spec(cls, arguments: str) -> FastV:
        """`LAYER[:KEEP[:PER]]`"""
        layer, *rest = arguments.split(":", 2)
        return cls(int(layer), *map(parse_keep, rest[:1]), *rest[1:])
