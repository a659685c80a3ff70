"""PyramidDrop (arXiv 2410.17247): visual tokens leave in stages, as the layers get deeper."""

from __future__ import annotations

from dataclasses import dataclass

from vtp_kernels._shown import shown

from .budget import SHARES, as_tuple
from .schedule import ScheduledMethod, Stage, parse_pairs

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(ScheduledMethod, key="pyramiddrop"):
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", as_tuple(self.layers, "PyramidDrop.layers"))
        object.__setattr__(self, "keep", as_tuple(self.keep, "PyramidDrop.keep", SHARES))
        if len(self.layers) != len(self.keep):
            raise ValueError(
                f"PyramidDrop: {len(self.layers)} layers {shown(self.layers)} but {len(self.keep)} "
                f"values of keep {shown(self.keep)}"
            )
        super().__post_init__()

    @property
    def stages(self) -> tuple[Stage, ...]:
        pairs = zip(self.layers, self.keep, strict=True)
        return tuple(
            Stage(*pair, f"PyramidDrop.layers[{i}]", f"PyramidDrop.keep[{i}]")
            for i, pair in enumerate(pairs)
        )

    @classmethod
    def from_spec(cls, arguments: str) -> PyramidDrop:
        """`8=0.5,16=0.25,24=0.125[:PER]`"""
        text, *per = arguments.split(":", 1)
        pairs = parse_pairs(text)
        return cls(tuple(pairs), tuple(pairs.values()), *per)
