"""Methods in words, where people read them: "FastV, 50 % from layer 2" for fastv:2:0.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from vtp_kernels.methods import METHODS, Chain, Method
from vtp_kernels.methods.chain import BETWEEN, specs_of

DENSE = "no pruning"


def readable(specs: Sequence[str | Method]) -> list[str]:
    """Names for methods that are shown together.

    Methods, and what stands for them on the command line ("fastv:2:0.5", "none"), are put into
    words. Of a kind that is there once its class may say enough; of several, the settings in which
    they differ are told. Everything else is a name already. No two that are written differently
    get one name: such stay as they are written.
    """
    found = [_method(spec) for spec in specs]
    names = []
    for spec, method in zip(specs, found, strict=True):
        if method is None:
            names.append(DENSE if spec in ("none", "dense") else spec)
            continue
        if isinstance(spec, str) and spec in METHODS:  # as one calls it, whatever its settings are
            names.append(type(method).__name__)
            continue
        others = [other for other in found if type(other) is type(method)]
        words = _words(method)
        told = words(method, others)
        rest = _differing(method, [x for x in others if words(x, others) == told])
        names.append(f"{told} ({rest})" if rest else told)
    return [
        spec if isinstance(spec, str) and names.count(name) > specs.count(spec) else name
        for spec, name in zip(specs, names, strict=True)
    ]


def of_reports(reports: Sequence[Any]) -> list[str]:
    """The methods of reports in words; of one's own that is not imported here, its name."""
    return readable([_reported(report.method) for report in reports])


def _reported(settings: Mapping[str, Any]) -> str | Method:
    try:
        return Method.from_dict(dict(settings))
    except ValueError:
        if settings["method"] in METHODS:
            raise
        return settings["method"]


def kind_of(name: str) -> str:
    """What a name in words is a case of: its class, "chance", or its first words; of a chain, those
    of its methods."""
    if BETWEEN in name and not name.startswith(Chain.name):
        return BETWEEN.join(map(kind_of, name.split(BETWEEN)))
    first = name.partition(":")[0].partition(",")[0]
    by_chance = first in ("RandomPruning", "random") or "by chance" in name
    return "chance" if by_chance else first


def _method(spec: str | Method) -> Method | None:
    """None for what is no method of this package on a command line. Nothing is imported or read
    because a name says so: it may come from a file."""
    if isinstance(spec, Method):
        return spec
    name, colon, arguments = spec.partition(":")
    kind = METHODS.get(name)
    if kind is None or not kind.__module__.startswith("vtp_kernels."):
        return None
    if kind is Chain:
        parts = [_method(part) for part in specs_of(arguments)]
        return Chain(*parts) if None not in parts and len(parts) > 1 else None
    if not colon:
        return kind()
    for read in (kind.from_spec, Method.from_spec.__get__(kind)):  # its own form, or FIELD=VALUE
        try:
            return read(arguments)
        except (TypeError, ValueError):
            continue
    return None


def _named(method: Method, others: Sequence[Method]) -> str:
    return ", ".join(filter(None, [type(method).__name__, _differing(method, others)]))


def _differing(method: Method, others: Sequence[Method]) -> str:
    """The settings that some of the others have otherwise."""
    told = []
    for field in fields(method):
        value = getattr(method, field.name)
        if any(getattr(other, field.name) != value for other in others):
            told.append(f"{field.name.replace('_', ' ')} {_value(value)}")
    return ", ".join(told)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _from_layer(method: Any, others: Sequence[Method]) -> str:
    return f"{type(method).__name__}, {_amount([method.keep])} from layer {method.layer}"


def _random(method: Any, others: Sequence[Method]) -> str:
    where = f" from layer {method.layer}" if method.layer else ""
    return f"{_amount([method.keep])} by chance{where}"


def _in_steps(method: Any, others: Sequence[Method]) -> str:
    return f"{type(method).__name__}, {_amount(method.keep)} from {_layers(method.layers)}"


def _schedule(method: Any, others: Sequence[Method]) -> str:
    by = "" if method.score == "last_token" else f" by {method.score.replace('_', ' ')}"
    if not method.keep:
        return DENSE
    return f"Schedule, {_amount(list(method.keep.values()))}{by} from {_layers(method.keep)}"


def _lvpruning(method: Any, others: Sequence[Method]) -> str:
    return f"LVPruning, {_amount(method.ratios)}"


def _chain(method: Any, others: Sequence[Method]) -> str:
    return BETWEEN.join(_words(part)(part, [part]) for part in method.parts)


def _words(method: Method) -> Callable[[Any, Sequence[Method]], str]:
    return _WORDS.get(type(method).__name__, _named)


def _keeping(method: Any, others: Sequence[Method]) -> str:
    return f"{type(method).__name__}, {_amount([method.keep])}"


def _inflection(method: Any, others: Sequence[Method]) -> str:
    told = [type(method).__name__, method.source, method.rule]
    if method.min_keep > 1:
        told.append(f"at least {method.min_keep}")
    if any(bool(other.llm_layers) != bool(method.llm_layers) for other in others):
        told.append("both stages" if method.llm_layers else "stage 1 alone")
    return ", ".join(told) if len(others) > 1 else told[0]


_WORDS: dict[str, Callable[[Any, Sequence[Method]], str]] = {
    "CDPruner": _keeping,
    "Chain": _chain,
    "DART": _from_layer,
    "DivPrune": _keeping,
    "FastV": _from_layer,
    "FrameDifference": _keeping,
    "HiPrune": _keeping,
    "InflectionPruning": _inflection,
    "LVPruning": _lvpruning,
    "PyramidDrop": _in_steps,
    "RandomPruning": _random,
    "Schedule": _schedule,
    "SparseVLM": _in_steps,
    "VidCom2": _keeping,
    "VisPruner": _keeping,
    "VisionZip": _keeping,
}


def _amount(keeps: Sequence[int | float]) -> str:
    """50, 25, 12.5 %; or 64 tokens."""
    if all(isinstance(keep, float) for keep in keeps):
        return ", ".join(f"{100 * keep:g}" for keep in keeps) + " %"
    words = (f"{100 * keep:g} %" if isinstance(keep, float) else str(keep) for keep in keeps)
    return ", ".join(words) + " tokens"


def _layers(layers: Any) -> str:
    numbers = [str(layer) for layer in layers]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
