"""What a method does in a model, layer by layer. It is the same in every call, so it is asked for
once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vtp_kernels.contract.method import Method
from vtp_kernels.contract.passive import PassiveVisual

__all__ = ["Plan"]


class Plan(NamedTuple):
    decisions: frozenset[int]
    """Layers before which rows may leave."""
    observed: frozenset[int]
    """Layers whose attention a decision looks at."""
    passive: Mapping[int, PassiveVisual]
    """How visual tokens are passive, in the layers where they are."""
    forgetful: frozenset[int]
    """Layers that forget visual keys after the prefill."""
    watched: frozenset[int]
    """Layers whose attention asks the call what to do."""
    changing: frozenset[int]
    """Layers that may be unlike the one before, in a call that brings no cache; all with linear
    attention are among them."""
    uneven: bool
    """Whether the model's own masks do not serve even before rows leave: layer 0, for whose keys it
    makes them, has fewer than others."""
    sees_pictures: bool
    """Whether decisions look at what the vision tower saw."""
    needs_units: bool
    """Whether they ask which picture or frame a visual token is of."""

    @classmethod
    def of(cls, method: Method, depth: int, linear: frozenset[int]) -> Plan:
        decisions = frozenset(method.decision_layers(depth))
        observed = frozenset(method.observed_layers(depth))
        passive = dict(method.passive_layers(depth))
        forgetful = frozenset(method.forgetful_layers(depth))
        behind = {layer + 1 for layer in passive.keys() | linear}
        return cls(
            decisions,
            observed,
            passive,
            forgetful,
            watched=observed | passive.keys(),
            changing=decisions | forgetful | passive.keys() | linear | behind | {0},
            uneven=bool(forgetful) or any(x.leaves_one for x in passive.values()),
            sees_pictures=method.vision_source() is not None,
            needs_units=method.needs_units(),
        )
