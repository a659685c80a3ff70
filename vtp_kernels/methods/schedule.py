"""A fixed schedule: at given layers, keep the best so many visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtp_kernels._shown import shown

from .budget import check_layer, visual_budget
from .scorers import SCORERS
from .stages import BudgetedMethod, Stage

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows

__all__ = ["Schedule", "ScheduledMethod", "Stage"]


class ScheduledMethod(BudgetedMethod):
    """One that ranks visual tokens by scores. Subclasses may set `score` (a key of SCORERS) and
    `seed`, too."""

    score: str = "last_token"
    seed: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.score not in SCORERS:
            raise ValueError(
                f"{owner}.score: got {shown(self.score)}, expected one of {list(SCORERS)}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"{owner}.seed: expected an int, got {shown(self.seed)}")
        super().__post_init__()
        for stage in self.stages:
            if stage.layer == 0 and SCORERS[self.score].needs_attention:
                raise ValueError(
                    f"{stage.layer_field}: score={self.score!r} looks at the attention of the "
                    "layer before, and there is none before layer 0; use a later layer or "
                    "score='random'"
                )

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        if not SCORERS[self.score].needs_attention:
            return ()
        return tuple(stage.layer - 1 for stage in self.stages)

    def visual_left(self, layer: int, pictures: Sequence[int]) -> int:
        """A picture is one frame; what videos leave depends on their frames."""
        budgets = [stage.keep for stage in self.stages if stage.layer <= layer]
        groups = [sum(pictures)] if self.per == "prompt" else pictures
        return sum(min([n, *(visual_budget(keep, n) for keep in budgets)]) for n in groups)

    def decide(self, layer: int, rows: PromptRows) -> Kept:
        if self.per != "prompt":
            budgets = self.budgets(layer, rows)
            choice = budgets.are_a_choice
            scores = SCORERS[self.score].score(rows, self.seed) if choice else None
            return rows.keep_of_each(*budgets, scores)
        there, counts = self.prompt_budgets(layer, rows)
        if all(count in (0, now) for count, now in zip(counts, there, strict=True)):
            return rows.keep_visual(counts, None)
        scorer = SCORERS[self.score]
        if scorer.attending is not None:
            return rows.keep_attended(counts, *scorer.attending(rows))
        return rows.keep_visual(counts, scorer.score(rows, self.seed))


@dataclass(frozen=True)
class Schedule(ScheduledMethod, key="schedule"):
    """Keep fixed numbers of visual tokens from given layers on.

    Parameters
    ----------
    keep : {layer: int | float}
        Before that layer runs, all but so many visual tokens leave: an int counts tokens, a float
        is a share of the visual tokens of the prompt (all its images together; rounded to the
        nearest count). 0 leaves none. Keys may be strings, as they are in JSON.
    score : "last_token" | "text" | "contribution" | "random"
        What ranks them: the attention of the layer before, from the last prompt token or from all
        text behind the first image (mean over heads); what they add to its output for the last
        prompt token; or chance.
    seed : int
        For score="random".
    per : "prompt" | "picture" | "frame"
        What `keep` is of: all visual tokens of the prompt; those of each picture ("image" is
        another word for it), and of each video, by itself; or those of each picture and each frame,
        so that every moment of a video keeps equally much. Every budget is rounded by itself,
        halves up. Frames that the model merges (two and two in Qwen) are one. Frames of InternVL
        and SmolVLM come as pictures. The methods' papers rank the tokens of a whole prompt; the
        other two are ours.
    """

    keep: Mapping[int, int | float]
    score: str = "last_token"
    seed: int = 0
    per: str = "prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise TypeError(f"Schedule.keep: expected {{layer: keep}}, got {shown(self.keep)}")
        keep = {_layer_of(key): value for key, value in self.keep.items()}
        if len(keep) != len(self.keep):
            raise ValueError(f"Schedule.keep: a layer is named twice in {dict(self.keep)}")
        object.__setattr__(self, "keep", dict(sorted(keep.items())))
        super().__post_init__()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(k, v, "Schedule.keep", f"Schedule.keep[{k}]") for k, v in self.keep.items()
        )

    @classmethod
    def from_spec(cls, arguments: str) -> Schedule:
        """`2=0.5,4=0.1[:SCORE[:PER]]`"""
        pairs, *rest = arguments.split(":")
        score, per = [*rest, *("last_token", "prompt")[len(rest) :]]
        return cls(parse_pairs(pairs), score=score or "last_token", per=per)


def parse_pairs(text: str) -> dict[int, int | float]:
    """`2=0.5,4=16` as {2: 0.5, 4: 16}."""
    keep: dict[int, int | float] = {}
    for pair in text.split(","):
        layer, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"expected LAYER=KEEP pairs as in 2=0.5,4=0.1, got {text!r}")
        if int(layer) in keep:
            raise ValueError(f"layer {int(layer)} is named twice in {text!r}")
        keep[int(layer)] = parse_keep(value)
    return keep


def parse_keep(text: str) -> int | float:
    """`64` counts tokens, `0.5` is a share."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _layer_of(key: object) -> int:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    return check_layer(key, "Schedule.keep")
