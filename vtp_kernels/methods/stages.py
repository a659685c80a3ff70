"""Methods whose layers and counts are known beforehand."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from vtp_kernels._shown import shown
from vtp_kernels.contract.checks import check_depth
from vtp_kernels.contract.method import Method, parse_settings, read_value

from .budget import SHARES, as_tuple, check_keep, check_layer, visual_budget
from .per import groups, left_of, read_per

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import PromptRows

__all__ = ["BudgetedMethod", "Budgets", "LayeredMethod", "Stage"]


class Stage(NamedTuple):
    """From `layer` on, `keep` of the visual tokens are left, of a prompt's or of each picture's.

    The fields are the settings these came from, for error messages.
    """

    layer: int
    keep: int | float
    layer_field: str
    keep_field: str


class Budgets(NamedTuple):
    """What stays of each group of visual tokens.

    group: int64 [B, S], of each visual row. there, counts: of each prompt's groups, how many rows
    each has, and how many of them stay.
    """

    group: Tensor
    there: list[list[int]]
    counts: list[list[int]]

    @property
    def of_groups(self) -> list[int]:
        """`counts` of all prompts' groups, in order."""
        return [n for of_prompt in self.counts for n in of_prompt]

    @property
    def are_a_choice(self) -> bool:
        """Whether it matters which rows of some group stay."""
        return any(
            0 < count < now
            for of_prompt in zip(self.counts, self.there, strict=True)
            for count, now in zip(*of_prompt, strict=True)
        )


class BudgetedMethod(Method):
    """A method whose layers and counts are known beforehand; only which tokens stay is not.

    Subclasses give `stages`, and may set `per` (what each budget is for, one of PER).
    """

    per: str = "prompt"

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Stages in ascending order of layers."""

    def __post_init__(self) -> None:
        per = read_per(self.per, f"{type(self).__name__}.per")
        if per != self.per:
            object.__setattr__(self, "per", per)
        before: Stage | None = None
        for stage in self.stages:
            check_layer(stage.layer, stage.layer_field)
            check_keep(stage.keep, stage.keep_field)
            if before is not None:
                _check_order(before, stage)
            before = stage

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(stage.layer for stage in self.stages)

    def check_model(self, depth: int) -> None:
        for stage in self.stages:
            check_depth(stage.layer, depth, stage.layer_field)

    def needs_units(self) -> bool:
        return self.per != "prompt"

    def decides_by_data(self, depth: int) -> None:
        return None

    def keep_from(self, layer: int) -> int | float:
        """The `keep` of the stage at that layer."""
        return next(stage.keep for stage in self.stages if stage.layer == layer)

    def budgets(self, layer: int, rows: PromptRows) -> Budgets:
        """What stays from `layer` on, of groups as `per` says."""
        keep = self.keep_from(layer)
        group, at_start = groups(rows, self.per)
        there = rows.memory.get("left of each")
        if there is None:  # the first decision of this method
            there = left_of(rows, group, at_start)
        counts = [
            [min(visual_budget(keep, n), now) for n, now in zip(*of_prompt, strict=True)]
            for of_prompt in zip(at_start, there, strict=True)
        ]
        rows.memory["left of each"] = counts
        return Budgets(group, there, counts)

    def prompt_budgets(self, layer: int, rows: PromptRows) -> tuple[list[int], list[int]]:
        """Of each prompt, how many visual tokens are there, and how many of them stay."""
        keep, there = self.keep_from(layer), rows.visual_now
        pairs = zip(rows.visual_at_start, there, strict=True)
        return there, [min(visual_budget(keep, at_start), now) for at_start, now in pairs]


class LayeredMethod(BudgetedMethod):
    """One whose settings are `layers` and how many visual tokens to `keep` at each of them."""

    layers: tuple[int, ...]
    keep: tuple[int | float, ...]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        object.__setattr__(self, "layers", as_tuple(self.layers, f"{owner}.layers"))
        object.__setattr__(self, "keep", as_tuple(self.keep, f"{owner}.keep", SHARES))
        if len(self.layers) != len(self.keep):
            raise ValueError(
                f"{owner}: {len(self.layers)} layers {shown(self.layers)} but {len(self.keep)} "
                f"values of keep {shown(self.keep)}"
            )
        super().__post_init__()

    @property
    def stages(self) -> tuple[Stage, ...]:
        owner, pairs = type(self).__name__, zip(self.layers, self.keep, strict=True)
        return tuple(
            Stage(*pair, f"{owner}.layers[{i}]", f"{owner}.keep[{i}]")
            for i, pair in enumerate(pairs)
        )

    @classmethod
    def from_spec(cls, arguments: str) -> LayeredMethod:
        """`FIELD=VALUE,...`, as in `layers=2+6,keep=0.5+0.25`"""
        readers = dict.fromkeys((field.name for field in fields(cls) if field.init), read_value)
        return cls(**parse_settings(arguments, readers | {"layers": _several, "keep": _several}))


def _several(text: str) -> tuple[Any, ...]:
    """2+6+15"""
    return tuple(read_value(number) for number in text.split("+") if number)


def _check_order(before: Stage, stage: Stage) -> None:
    if stage.layer <= before.layer:
        raise ValueError(
            f"{stage.layer_field}: layers must ascend, {stage.layer} comes after {before.layer}"
        )
    if type(stage.keep) is type(before.keep) and stage.keep > before.keep:
        raise ValueError(
            f"{stage.keep_field}: tokens that left do not come back: layer {before.layer} keeps "
            f"{before.keep}, layer {stage.layer} asks for {stage.keep}"
        )
