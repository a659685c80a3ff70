"""PyramidDrop (arXiv 2410.17247): visual tokens leave in stages, as the layers get deeper."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import ScheduledMethod, parse_pairs
from .stages import LayeredMethod

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(LayeredMethod, ScheduledMethod, key="pyramiddrop"):
    """At each of `layers`, keep that share of the visual tokens, ranked by the last prompt token.

    Parameters
    ----------
    layers : tuple of int
        Ascending; the default are the quarters of a 32-layer model.
    keep : tuple of int | float
        One per layer; shares are of the tokens the prompt came with, not of the stage before.
    per : "prompt" | "picture" | "frame"
        What `keep` is of, as in `Schedule`.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[int | float, ...] = (0.5, 0.25, 0.125)
    per: str = "prompt"

    @classmethod
    def from_spec(cls, arguments: str) -> PyramidDrop:
        """`8=0.5,16=0.25,24=0.125[:PER]`"""
        text, *per = arguments.split(":", 1)
        pairs = parse_pairs(text)
        return cls(tuple(pairs), tuple(pairs.values()), *per)
