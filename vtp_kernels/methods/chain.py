"""Methods that act one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling

from vtp_kernels._shown import shown
from vtp_kernels.contract.checks import check_layers
from vtp_kernels.contract.counts import on_host
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.contract.spec import part_of_spec

if TYPE_CHECKING:
    from vtp_kernels.contract.rows import Kept, PromptRows
    from vtp_kernels.contract.unit import Unit

__all__ = ["BETWEEN", "Chain", "parts_of", "specs_of"]

BETWEEN = " + "


@dataclass(frozen=True, init=False)
class Chain(Method, key="chain"):
    """Methods that act at different layers, as one: `Chain(DivPrune(keep=192), FastV(2, 0.5))`.

    They act in the order in which they are given, and each has done before the next begins: the
    layers before which one decides come before all those of the next. Counts and shares are of the
    prompt's original visual tokens, whatever those before have left: FastV keeps half of 576
    tokens, or what is there if that is less. What one of them notes is its own.

    Where one leaves its counts on the device (InflectionPruning with `max_keep`), the host reads
    them when the next begins.

    Parameters
    ----------
    parts : two methods or more
        None of them a chain. At most one with passive visual tokens.

    Raises
    ------
    TypeError, ValueError
        For parts that are no methods, are chains, or are fewer than two; and when applied to a
        model, for parts that decide before the same layer, or not in this order, and for two with
        passive layers.
    """

    parts: tuple[Method, ...]

    def __init__(self, *parts: Method) -> None:
        for index, part in enumerate(parts):
            where = f"Chain.parts[{index}]"
            if not isinstance(part, Method):
                raise TypeError(f"{where}: expected a Method, got {shown(part)}")
            if isinstance(part, Chain):
                raise ValueError(f"{where}: a chain within a chain; name its parts in its place")
        if len(parts) < 2:
            raise ValueError(f"Chain.parts: expected two methods or more, got {len(parts)}")
        object.__setattr__(self, "parts", parts)

    # ---- what the engine asks -----------------------------------------------------------------

    def decision_layers(self, depth: int) -> tuple[int, ...]:
        return self._layers(lambda part: part.decision_layers(depth))

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return self._layers(lambda part: part.observed_layers(depth))

    def acausal_layers(self, depth: int) -> tuple[int, ...]:
        return self._layers(lambda part: part.acausal_layers(depth))

    def forgetful_layers(self, depth: int) -> tuple[int, ...]:
        return self._layers(lambda part: part.forgetful_layers(depth))

    def _layers(self, of: Callable[[Method], Any]) -> tuple[int, ...]:
        return tuple(sorted({layer for part in self.parts for layer in of(part)}))

    def passive_layers(self, depth: int) -> Mapping[int, PassiveVisual]:
        return {k: v for part in self.parts for k, v in part.passive_layers(depth).items()}

    def vision_source(self) -> str | None:
        # Only a method that decides before layer 0 may have one, so no two have.
        return next(filter(None, (part.vision_source() for part in self.parts)), None)

    def needs_units(self) -> bool:
        return any(part.needs_units() for part in self.parts)

    def check_units(self, units: list[list[Unit]]) -> None:
        for part in self.parts:
            if part.needs_units():
                part.check_units(units)

    def needs_ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op for part in self.parts for op in part.needs_ops()))

    def decides_by_data(self, depth: int) -> str | None:
        return next(filter(None, (part.decides_by_data(depth) for part in self.parts)), None)

    def check_model(self, depth: int) -> None:
        for part in self.parts:
            part.check_model(depth)
            check_layers(part, depth)
        for part, after in pairwise(p for p in self.parts if p.decision_layers(depth)):
            _check_order(part, after, depth)
        passive = [part for part in self.parts if part.passive_layers(depth)]
        if len(passive) > 1:
            names = " and ".join(type(part).__name__ for part in passive[:2])
            raise ValueError(
                f"Chain.parts: {names} both have layers with passive visual tokens, and only one "
                "method of a chain can"
            )

    def check_config(self, family: str, config: Any) -> None:
        for part in self.parts:
            part.check_config(family, config)

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        part = self.parts[self._number(layer, config.num_hidden_layers)]
        return part.decision_flops(layer, config, text, visual, kept)

    # ---- what it decides ----------------------------------------------------------------------

    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        number = self._number(layer, rows.depth)
        part = self.parts[number]
        rows.asker = f"{type(part).__name__}.decide before layer {layer}, in a chain"
        # What those before it left on the device are not its counts. Compiled code knows them all.
        if number not in rows.memory and not is_compiling():
            rows.text_now, rows.visual_now = on_host(rows.text_now), on_host(rows.visual_now)
        rows.memory = rows.memory.setdefault(number, {})
        return part.decide(layer, rows)

    def _number(self, layer: int, depth: int) -> int:
        """Which of the parts decides before a layer."""
        return next(i for i, x in enumerate(self.parts) if layer in x.decision_layers(depth))

    def events(self, memory: dict[Any, Any]) -> list[dict[str, Any]]:
        return [
            event
            for number, part in enumerate(self.parts)
            if number in memory
            for event in part.events(memory[number])
        ]

    # ---- storage ------------------------------------------------------------------------------

    @classmethod
    def _made_of(cls, settings: dict[str, Any]) -> Chain:
        parts = settings["parts"]
        if not isinstance(parts, list | tuple):
            raise TypeError(f"Chain.parts: expected a list of methods, got {shown(parts)}")
        return cls(*(x if isinstance(x, Method) else Method.from_dict(x) for x in parts))

    @classmethod
    def from_spec(cls, arguments: str) -> Chain:
        """`METHOD + METHOD + ...`, each as it is written alone; the spaces belong to it."""
        return cls(*map(part_of_spec, specs_of(arguments)))


def _check_order(part: Method, after: Method, depth: int) -> None:
    first, then = part.decision_layers(depth), after.decision_layers(depth)
    if max(first) < min(then):
        return
    names = [type(x).__name__ for x in (part, after)]
    if both := sorted(set(first) & set(then)):
        raise ValueError(
            f"Chain.parts: {names[0]} and {names[1]} both decide before layer {both[0]}"
        )
    raise ValueError(
        f"Chain.parts: {names[0]} decides before layers {min(first)} to {max(first)}, and "
        f"{names[1]}, which comes after it, before layer {min(then)}; a method has to have done "
        "before the next begins, and they act in the order in which they are given"
    )


def specs_of(arguments: str) -> list[str]:
    """Those of the methods of a chain, of what is behind `chain:` in its own."""
    return [spec.strip() for spec in arguments.split(BETWEEN)]


def parts_of(method: Method | None) -> tuple[Method, ...]:
    """The methods of a chain; of another, itself; of none, none."""
    if method is None:
        return ()
    return method.parts if isinstance(method, Chain) else (method,)
