"""What the engine asks of a pruning method, and how methods are stored.

A method is a frozen dataclass that answers two questions: before which layers may rows leave
(`decision_layers`), and which of the rows that are there should stay (`decide`). It knows neither
hooks nor caches; the engine shows it the prompt's rows and carries out what it says.

A new method is a subclass in a file of its own:

    @dataclass(frozen=True)
    class KeepLongest(Method, key="keeplongest"):
        layer: int = 4
        keep: int = 64

        def decision_layers(self, depth):
            return (self.layer,)

        def decide(self, layer, rows):
            scores = rows.hidden.float().norm(dim=-1)
            return rows.keep_visual([min(self.keep, n) for n in rows.visual_now], scores)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .passive import PassiveVisual

if TYPE_CHECKING:
    from vtp_kernels.models.rows import Kept, PromptRows

METHODS: dict[str, type[Method]] = {}
"""Every method by the name it has in files and on the command line."""


class Method(ABC):
    """Base class of all pruning methods. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    # `key`, for `name` is what Python 3.10 calls an argument of its own here.
    def __init_subclass__(cls, key: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key is not None:
            cls.name = key
            METHODS[key] = cls

    # ---- what the engine asks ----------------------------------------------------------------

    @abstractmethod
    def decision_layers(self, depth: int) -> Sequence[int]:
        """Layers (0-based), in a model of `depth` of them, before which rows may leave."""

    def observed_layers(self, depth: int) -> Sequence[int]:
        """Layers whose attention `decide` looks at. To decide at layer K, observe layer K - 1."""
        return ()

    def passive_layers(self, depth: int) -> Mapping[int, PassiveVisual]:
        """Layers in which visual tokens are passive, and how."""
        return {}

    def vision_source(self) -> str | None:
        """What `decide` asks of the vision tower, as `rows.vision` before layer 0: "similarity" of
        its tokens to CLS, "attention" that they get from it, or nothing."""
        return None

    def forgetful_layers(self, depth: int) -> Sequence[int]:
        """Layers whose KV cache loses all visual rows once the prompt has been read."""
        return ()

    @abstractmethod
    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        """Which rows stay from `layer` on; None leaves them all."""

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        """What report() is to tell of a prefill besides the rows that left, given what `decide`
        noted in `rows.memory`: dicts with at least "layer" and "event"."""
        return []

    def check_model(self, depth: int) -> None:
        """Raise ValueError if the method does not fit a model of `depth` decoder layers."""
        for layer in self.decision_layers(depth):
            check_depth(layer, depth, type(self).__name__)

    def check_config(self, family: str, config: Any) -> None:  # noqa: B027
        """Raise ValueError if the method does not fit a model of that family (as of
        `supported_models()`), or its language model's configuration."""

    def decision_flops(self, layer: int, config: Any, text: int, visual: int, kept: int) -> int:
        """What it costs to decide before `layer`, besides running the model, that `kept` of the
        `visual` tokens stay which a prompt has there among `text` others: FLOPs, 2 per
        multiply-accumulate. `config` is the language model's."""
        return 0

    # ---- storage -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the key "method" says which method it is."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"method": self.name} | {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Method:
        """The method that `to_dict` described.

        Called on `Method` it makes whichever method the key "method" names; called on a subclass it
        accepts that method alone. Fields left out have their defaults; unknown ones raise.
        """
        if not isinstance(values, dict) or "method" not in values:
            raise ValueError(
                f'a method description needs the key "method", one of {sorted(METHODS)}; '
                f"got {values!r}"
            )
        settings = dict(values)
        name = settings.pop("method")
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; there are {sorted(METHODS)}")
        method = METHODS[name]
        if not issubclass(method, cls):
            raise ValueError(f'{cls.__name__} expects "method": {cls.name!r}, got {name!r}')
        known = {field.name for field in fields(method)}  # type: ignore[arg-type]
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{method.__name__} has no {unknown}; it has {sorted(known)}")
        return method(**settings)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Method:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_spec(cls, arguments: str) -> Method:
        """The method that the part after `name:` of a command-line spec describes."""
        raise ValueError(f"{cls.name} takes no arguments on the command line, got {arguments!r}")


def check_depth(layer: int, depth: int, where: str) -> None:
    if layer >= depth:
        raise ValueError(
            f"{where}: there is no layer {layer}, the model has {depth} decoder layers "
            f"(0 to {depth - 1})"
        )


def parse_settings(arguments: str, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """`FIELD=VALUE,...` of a command-line spec as keyword arguments; `readers` by field."""
    settings: dict[str, Any] = {}
    for pair in arguments.split(","):
        name, equals, value = pair.partition("=")
        if not equals or name not in readers:
            raise ValueError(f"expected FIELD=VALUE with one of {sorted(readers)}, got {pair!r}")
        settings[name] = readers[name](value)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
