"""How many visual tokens an image may take in vLLM, and what chooses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vtp_kernels._shown import shown
from vtp_kernels.methods.budget import check_keep, visual_budget

__all__ = ["KEY", "SCORES", "Budget", "without_budget"]

#: Where the settings stand in vLLM's `mm_processor_kwargs`. Of the ways that settings travel, this
#: one reaches the processor and the workers, may differ from request to request, and is part of the
#: keys of vLLM's caches. Inside of `images_kwargs` transformers refuses what it does not know: with
#: the plugin switched off, the settings are an error and not forgotten.
SCOPE, KEY = "images_kwargs", "vtp"
SCORES = ("attention", "similarity", "divprune")


@dataclass(frozen=True)
class Budget:
    """How many of its visual tokens every image keeps. That follows from its size alone.

    Parameters
    ----------
    keep : int | float
        Rows of the prompt that an image takes: a count, at least 1, or a share of those that it
        would take unpruned, above 0.0, rounded as methods in transformers round it, and at least
        one row. An image that has no more rows than a count keeps them all. Views of an image (the
        crops of LLaVA-NeXT) compete for one number. Rows that end a line (`image_newline`) leave
        first, but for "divprune".
    score : "attention" | "similarity" | "divprune"
        "attention": what the tokens get from CLS in the feature layer of the vision tower, mean
        over heads, as `vtp.VisPruner(keep, important=1.0, per="picture")` takes it. "similarity":
        their cosine to CLS there, each view to its own. "divprune": rows that are as unlike each
        other as can be, as `vtp.DivPrune(keep, per="picture")` chooses them.
    at_most : int, optional
        Beside a share: the most rows that any image keeps.
    """

    keep: int | float
    score: str = "attention"
    at_most: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep, f"{KEY}.keep")
        if self.keep == 0:
            raise ValueError(
                f"{KEY}.keep: expected at least 1 token, or a share above 0.0, got {self.keep}"
            )
        if self.score == "cdpruner":
            raise ValueError(
                f"{KEY}.score: 'cdpruner' looks at all text of a prompt and at its other images, "
                "and vLLM encodes and caches an image without them; 'divprune' does not need the "
                "text"
            )
        if self.score not in SCORES:
            raise ValueError(f"{KEY}.score: expected one of {SCORES}, got {shown(self.score)}")
        self._check_at_most()

    def _check_at_most(self) -> None:
        if self.at_most is None:
            return
        if isinstance(self.at_most, bool) or not isinstance(self.at_most, int):
            raise TypeError(f"{KEY}.at_most: expected an int, got {shown(self.at_most)}")
        if self.at_most < 1:
            raise ValueError(f"{KEY}.at_most: expected at least 1, got {self.at_most}")
        if isinstance(self.keep, int):
            raise ValueError(
                f"{KEY}.at_most: bounds a share, as in keep=0.25; keep is the count {self.keep}"
            )

    def rows(self, unpruned: int) -> int:
        """How many rows an image keeps that would take so many. More of these are never fewer."""
        kept = max(visual_budget(self.keep, unpruned), min(1, unpruned))
        return kept if self.at_most is None else min(kept, self.at_most)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_numbers(self) -> list[float]:
        """The same as numbers for a tensor of float64, which holds each of them exactly."""
        share = isinstance(self.keep, float)
        return [self.keep, share, SCORES.index(self.score), self.at_most or 0]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Budget:
        """What `to_numbers` made numbers of."""
        keep, share, score, at_most = numbers
        return cls(keep if share else int(keep), SCORES[int(score)], int(at_most) or None)

    @classmethod
    def of(cls, mm_processor_kwargs: Mapping[str, Any] | None) -> Budget | None:
        """The settings in vLLM's `mm_processor_kwargs`; None where there are none.

        Raises ValueError or TypeError for settings in the wrong place and keys that are not known.
        """
        kwargs = mm_processor_kwargs or {}
        if KEY in kwargs:
            raise ValueError(
                f"{KEY}: expected within {SCOPE!r} of mm_processor_kwargs, as in "
                f'{{"{SCOPE}": {{"{KEY}": {{"keep": 144}}}}}}'
            )
        scope = kwargs.get(SCOPE)
        value = scope.get(KEY) if isinstance(scope, Mapping) else None
        if value is None:
            return None
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise TypeError(f"{KEY}: expected a mapping with {known}, got {shown(value)}")
        if unknown := sorted(map(str, value.keys() - set(known))):
            raise ValueError(f"{KEY}: there is no {', '.join(unknown)}; expected {known}")
        if "keep" not in value:
            raise ValueError(f"{KEY}.keep: expected how many tokens an image keeps, got nothing")
        return cls(**value)

    def check_most(self, most: int) -> None:
        """Raise ValueError if `keep` is a count, and more than images have at most, unpruned."""
        if isinstance(self.keep, int) and self.keep > most:
            raise ValueError(f"{KEY}.keep: images have at most {most} tokens, got {self.keep}")


def without_budget(mm_processor_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`mm_processor_kwargs` as transformers knows them."""
    kwargs = dict(mm_processor_kwargs or {})
    scope = kwargs.get(SCOPE)
    if isinstance(scope, Mapping) and KEY in scope:
        scope = {name: value for name, value in scope.items() if name != KEY}
        kwargs[SCOPE] = scope
        if not scope:
            del kwargs[SCOPE]
    return kwargs
