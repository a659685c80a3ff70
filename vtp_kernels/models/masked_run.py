"""A model whose visual rows are masked instead of removed, so that a choice among them can learn.

The counterpart of the engine for training: hooks ask for a policy before the layers where rows
would leave, and from there on the attention of every layer goes by it. The model's parameters, its
state_dict and its forward stay as they are, and `remove()` leaves nothing behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .attention.policy_attention import PolicyAttention
from .attention.projections import refuse_sinks
from .attention.stand_ins import CALL, AttentionShadow
from .families import ModelParts
from .modules.shadow import StaysBehind

__all__ = ["MaskedRun", "check_masks"]


def check_masks(parts: ModelParts) -> None:
    """Raise NotImplementedError for models in which no mask does what rows that leave do."""
    if parts.linear:
        raise NotImplementedError(
            f"model: {parts.family} has layers with linear attention or a convolution, in which no "
            "mask can say that a row left; so there is nothing in which a choice among rows could "
            "learn"
        )
    for layer in parts.layers:
        refuse_sinks(layer.self_attn, f"model: {parts.family} cannot learn a choice among rows")


class MaskedRun(StaysBehind):
    """Attached on `__enter__`, taken off on `__exit__`.

    Parameters
    ----------
    parts : of the model, as `families.parts_of` gives them
    layers : decoder layers (0-based) before which `decide` is asked
    decide : (layer, hidden [B, S, C]) -> policy float [B, S]
        1 for rows that stay, 0 for those that other rows no longer see; autograd goes through it.
    secant : as of `policy_attention`

    `valid` bool [B, S] or None says which rows of the next call are no padding.
    """

    def __init__(
        self,
        parts: ModelParts,
        layers: Sequence[int],
        decide: Callable[[int, Tensor], Tensor],
        *,
        secant: bool = True,
    ) -> None:
        check_masks(parts)
        if parts.page.sees_ahead or any(kind.window is not None for kind in parts.kinds):
            raise NotImplementedError(
                f"{parts.family} cannot train what decides: its rows see a sliding window, or some "
                "rows that come after them, and the attention under a policy knows neither"
            )
        self.parts, self.layers, self.decide = parts, frozenset(layers), decide
        self.secant = secant
        self.valid: Tensor | None = None
        self.policy: Tensor | None = None
        self.hooks: list[Any] = []
        self.shadows: list[AttentionShadow] = []

    def __enter__(self) -> MaskedRun:
        first = min(self.layers)
        for index, layer in enumerate(self.parts.layers):
            if index < first:
                continue
            before = functools.partial(self._before_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            attention = layer.self_attn
            self.shadows.append(AttentionShadow(attention, index, PolicyAttention(attention)))
        for shadow in self.shadows:
            shadow.put()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        for shadow in self.shadows:
            shadow.remove()
        self.hooks.clear()
        self.shadows.clear()
        self.policy = self.valid = None

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.idle:
            return None
        if index in self.layers:
            self.policy = self.decide(index, args[0] if args else kwargs["hidden_states"])
        return args, kwargs | {CALL: self}

    def attending(self, layer: int, attention: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        return {"policy": self.policy, "valid": self.valid, "secant": self.secant}
