"""How a layer's attention treats visual tokens that are passive."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PassiveVisual"]


@dataclass(frozen=True)
class PassiveVisual:
    """Text gives no weight to visual tokens: the options of `vtp_kernels.passive_attention`.

    With `spare_second_half` text rows go on attending to the second half of a prompt's visual
    tokens, and only the first half is passive for them.
    """

    sink: str
    visual_rows: str
    renormalize: bool = False
    spare_second_half: bool = False

    @property
    def leaves_one(self) -> bool:
        """Whether all that takes part is text and the first visual token: it is as if the others
        were not there, so their queries, keys and values need not be made."""
        return self.sink == "merge" and self.visual_rows == "skip" and self.renormalize
