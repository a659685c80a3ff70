"""What a method says of itself, checked against a model before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from vtp_kernels._shown import shown

from .passive import PassiveVisual
from .vision import asks_of

__all__ = ["check_depth", "check_layers"]


def check_layers(method: Any, depth: int) -> None:
    """Raise TypeError or ValueError unless all that `method` asks for can be had in a model of
    `depth` decoder layers."""
    name = type(method).__name__
    decided = _layers(method.decision_layers(depth), depth, f"{name}.decision_layers")
    for layer in _layers(method.observed_layers(depth), depth, f"{name}.observed_layers"):
        if layer + 1 not in decided:
            raise ValueError(
                f"{name}.observed_layers: layer {layer} is for a decision before layer "
                f"{layer + 1}, and decision_layers are {sorted(decided)}"
            )
    _layers(method.forgetful_layers(depth), depth, f"{name}.forgetful_layers")
    passive = method.passive_layers(depth)
    if not isinstance(passive, Mapping):
        raise TypeError(f"{name}.passive_layers: expected a mapping, got {shown(passive)}")
    _layers(passive, depth, f"{name}.passive_layers")
    for layer, how in passive.items():
        if not isinstance(how, PassiveVisual):
            raise TypeError(
                f"{name}.passive_layers[{layer}]: expected a PassiveVisual, got {shown(how)}"
            )
    _check_source(method.vision_source(), decided, f"{name}.vision_source")


def _layers(layers: Any, depth: int, where: str) -> set[int]:
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"{where}: expected layers, as (4,), got {shown(layers)}")
    found = list(layers)
    for layer in found:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise TypeError(f"{where}: a layer is an int, got {shown(layer)}")
        check_depth(layer, depth, where)
    return set(found)


def check_depth(layer: int, depth: int, where: str) -> None:
    if not 0 <= layer < depth:
        raise ValueError(
            f"{where}: there is no layer {layer}, the model has {depth} decoder layers "
            f"(0 to {depth - 1})"
        )


def _check_source(source: Any, decided: set[int], where: str) -> None:
    try:
        asked = asks_of(source)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    if asked and 0 not in decided:
        raise ValueError(
            f"{where}: rows.vision is there before layer 0 only, and decision_layers are "
            f"{sorted(decided)}"
        )
