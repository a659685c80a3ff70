"""What the engine asks of a pruning method, and how methods are stored.

A method is a frozen dataclass that answers two questions: before which layers may rows leave
(`decision_layers`), and which of the rows that are there should stay (`decide`). It knows neither
hooks nor caches; the engine shows it the prompt's rows and carries out what it says.

A new method is a subclass in a file of its own:

    from dataclasses import dataclass

    import vtp_kernels as vtp

    @dataclass(frozen=True)
    class KeepLongest(vtp.Method, key="keeplongest"):
        layer: int = 4
        keep: int = 64

        def decision_layers(self, depth):
            return (self.layer,)

        def decide(self, layer, rows):
            scores = rows.hidden.float().norm(dim=-1)
            return rows.keep_visual([min(self.keep, n) for n in rows.visual_now], scores)

`vtp.prune(model, KeepLongest(layer=2))` runs it. What `rows` has to offer is said in
`vtp_kernels.contract.rows.PromptRows`. `decide` answers with what one of these returns, or None:

    rows.keep_visual(counts, scores)    all text, and so many visual tokens of each prompt, by rank
    rows.keep_of_each(...)              the same of each picture or frame; also keep_diverse
    rows.keep_where(mask, counts)       all text, and the visual tokens in a mask
    rows.keep_rows(mask)                the rows in a mask, text or visual
    rows.with_content(kept, ...)        one of these, with another content in rows that stay

The last prompt token and any drafts behind it have to stay, for their logits are asked for. Counts
have to be those of the mask, and no more than is there. What is wrong raises a ValueError: on a CPU
always, on a GPU where the host knows it. Nothing waits there to look at a mask; one that does not
fit its counts stops the GPU with a device-side assertion, which no process survives. After
`vtp.debug(True)` it is a ValueError, too. Without counts `keep_rows` counts by itself, and waits.

To look at attention before layer K, name K - 1 in `observed_layers` and ask `rows` for scores.

Settings are the fields; a class that adds none to those of its base needs no decorator. The key is
the method's name in files, and nobody else's. Without one it is "module:Class". A file
never makes anything be imported, so import the module before you load a file with a method of it.
JSON has no tuples: a field whose default is one gets one, and others get a list. On the command
line, `package.module:KeepLongest:layer=2,keep=32` imports the module and sets fields; `from_spec`
can read something else behind the second colon.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vtp_kernels._shown import shown

from .checks import check_layers
from .passive import PassiveVisual
from .storage import read_json

if TYPE_CHECKING:
    import torch

    from .rows import Kept, PromptRows
    from .unit import Unit
    from .vision import Ask, PromptVision

METHODS: dict[str, type[Method]] = {}
"""Every method that has been imported, by the name it has in files and on the command line."""

RESERVED = ("method", "module", "name")
"""No settings: in a file the first two say which method it is."""


class Method(ABC):
    """Base class of all pruning methods. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    #: What it always asks the vision tower for: some of `contract.vision.ASKS`; "layers" if not of
    #: the features' layer alone, and "grids" if it is to know how tokens stand in a picture.
    needs_tower: ClassVar[tuple[str, ...]] = ()

    # `key`, for `name` is what Python 3.10 calls an argument of its own here.
    def __init_subclass__(cls, key: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key is not None:
            _check_key(key, cls)
            cls.name = key
            METHODS[key] = cls
        elif _is_remade(cls):
            METHODS[cls.name] = cls
        else:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        _check_class(cls)
        return super().__new__(cls)

    # ---- what the engine asks ----------------------------------------------------------------

    @abstractmethod
    def decision_layers(self, depth: int) -> Sequence[int]:
        """Layers (0-based), in a model of `depth` of them, before which rows may leave."""

    def observed_layers(self, depth: int) -> Sequence[int]:
        """Layers whose attention `decide` looks at. To decide at layer K, observe layer K - 1; what
        was seen in other layers is gone by then."""
        return ()

    def acausal_layers(self, depth: int) -> Sequence[int]:
        """Those of them of which `decide` asks what rows would see of others after them
        (`rows.attention_scores(causal=False)`). They must not be ones with a sliding window."""
        return ()

    def passive_layers(self, depth: int) -> Mapping[int, PassiveVisual]:
        """Layers in which visual tokens are passive, and how."""
        return {}

    def vision_source(self) -> str | Ask | Sequence[str | Ask] | None:
        """What `decide` asks of the vision tower, to have it of `rows.vision` before layer 0: one
        or several of `contract.vision.ASKS`, such as "attention" that its tokens get from CLS, or
        `Ask("keys", layer=-2)`; or nothing."""
        return None

    def needs_units(self) -> bool:
        """Whether `decide` asks which picture or frame a visual token is of: `rows.unit`. It is
        then found out when a call begins, where the host waits anyway."""
        return False

    def check_units(self, units: list[list[Unit]]) -> None:  # noqa: B027
        """Raise ValueError if it cannot do with the pictures and frames of a call, those of each
        prompt in order. Asked when the call begins, of methods that need units."""

    def look_ahead(self, vision: PromptVision) -> None:  # noqa: B027
        """Ask `vision` for what `decide` will have to know of it on the host: called when the tower
        has run, before the layers do, which may be compiled."""

    def needs_ops(self) -> Sequence[str]:
        """Ops of this package by which it decides, and which the engine itself does not need: their
        backend is looked for when it is applied."""
        return ()

    def forgetful_layers(self, depth: int) -> Sequence[int]:
        """Layers whose KV cache loses all visual rows once the prompt has been read."""
        return ()

    @abstractmethod
    def decide(self, layer: int, rows: PromptRows) -> Kept | None:
        """Which rows stay from `layer` on, as `rows.keep_visual`, `keep_where` or `keep_rows` say
        it; None leaves them all."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Load what `decide` needs besides rows on that device and of that dtype. It would be
        loaded when it is first needed; what measures its memory before (vLLM) calls this."""

    def visual_left(self, layer: int, pictures: Sequence[int]) -> int | None:
        """How many visual tokens are left from `layer` on, of a prompt whose pictures came with so
        many each, if that follows from these numbers alone; None where only `decide` can tell.
        What sets memory aside before anything runs (`vtp_kernels.vllm`) asks for it. All text stays
        then."""
        return None

    def visual_most(self, layer: int, pictures: Sequence[int]) -> int | None:
        """The same, or where only `decide` can tell, how many these are at most: memory is set
        aside for so many, and for all text. None: not to be asked of this method."""
        return self.visual_left(layer, pictures)

    def decides_by_data(self, depth: int) -> str | None:
        """In a model of so many layers: what makes how many rows stay a matter of what the model
        computes, in words; None if that follows from the lengths of prompts and the numbers of
        their visual tokens. Then nothing between the layers needs the host, and they can be
        compiled (`Handle.compile`)."""
        if self.visual_left(depth, (1,)) is None:
            return "its visual_left does not say"
        return None

    def events(self, memory: dict[str, Any]) -> list[dict[str, Any]]:
        """What report() is to tell of a prefill besides the rows that left, given what `decide`
        noted in `rows.memory`: dicts with at least "layer" and "event"."""
        return []

    def check_model(self, depth: int) -> None:
        """Raise ValueError if the method does not fit a model of `depth` decoder layers."""
        check_layers(self, depth)

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
        """Plain JSON types, if the settings are; "method" says which method it is, and "module"
        where one of your own comes from."""
        kind = {"method": self.name}
        if ":" not in self.name and not _ours(type(self)):
            kind["module"] = type(self).__module__
        values = {field.name: getattr(self, field.name) for field in _fields(type(self))}
        return kind | {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Method:
        """The method that `to_dict` described.

        Called on `Method` it makes whichever method the key "method" names; called on a subclass it
        accepts that method alone. Fields left out have their defaults; unknown ones raise. Nothing
        is imported: a method of your own is found once its module has been, and the error says
        which that is.
        """
        if not isinstance(values, dict) or not isinstance(values.get("method"), str):
            raise ValueError(
                f'a method description needs the key "method", one of {sorted(known_methods())}; '
                f"got {shown(values)}"
            )
        settings = dict(values)
        method = _find(settings.pop("method"), settings.pop("module", None))
        if not issubclass(method, cls):
            raise ValueError(f'{cls.__name__} expects "method": {cls.name!r}, got {method.name!r}')
        known = {field.name: field for field in _fields(method)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{method.__name__} has no {unknown}; it has {sorted(known)}")
        needed = {
            name
            for name, field in known.items()
            if field.init and field.default is MISSING and field.default_factory is MISSING
        }
        if missing := sorted(needed - settings.keys()):
            raise ValueError(f"{method.__name__} needs {missing}")
        for name, value in settings.items():
            if isinstance(value, list) and isinstance(known[name].default, tuple):
                settings[name] = tuple(value)  # JSON has no tuples
        return method._made_of(settings)

    @classmethod
    def _made_of(cls, settings: dict[str, Any]) -> Method:
        """With fields as they are in a file."""
        return cls(**settings)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON. Raises TypeError naming a setting that JSON has no form for."""
        values = self.to_dict()
        for name, value in values.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{type(self).__name__}.{name} is no JSON: {error}") from error
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Method:
        """Read what `save` wrote. Raises OSError if the file cannot be read, and ValueError naming
        it if it describes no method that is known here."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_spec(cls, arguments: str) -> Method:
        """The method that the part after `name:` of a command-line spec describes. That is
        `FIELD=VALUE,...` unless a method has a form of its own."""
        known = [field.name for field in _fields(cls) if field.init]
        if not known:
            raise ValueError(f"{cls.__name__} has no settings, got {arguments!r}")
        return cls(**parse_settings(arguments, dict.fromkeys(known, read_value)))


def known_methods() -> dict[str, type[Method]]:
    """METHODS, once those of this package are among them."""
    importlib.import_module("vtp_kernels.methods")
    return METHODS


def _check_key(key: Any, cls: type[Method]) -> None:
    """Raise if `key` is no name, or that of another method."""
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", key) or key == "none":
        raise ValueError(
            f"{cls.__qualname__}: a key has letters, digits, _ and -, and is not 'none'; got "
            f"{shown(key)}"
        )
    holder = (METHODS if _ours(cls) else known_methods()).get(key)
    # Running a notebook's cell again, or importing a script that runs, defines the same class anew.
    if holder is not None and _home(holder) != _home(cls):
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__}: the key {key!r} is that of "
            f"{holder.__module__}.{holder.__qualname__}; choose another"
        )


def _is_remade(cls: type[Method]) -> bool:
    """Whether this is what @dataclass(slots=True) makes of a class that has been here, with its
    name, module and attributes and without its key."""
    first = METHODS.get(str(vars(cls).get("name")))
    return first is not None and all(
        getattr(first, name) == getattr(cls, name) for name in ("__module__", "__name__")
    )


def _home(cls: type) -> tuple[str, str]:
    """Where a class is written: its file, or the module where there is none, and its name."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file or cls.__module__, cls.__qualname__


def _check_class(cls: type[Method]) -> None:
    """Raise TypeError for a class whose settings are not the fields of a frozen dataclass, unless
    it tells of itself."""
    if cls.to_dict is not Method.to_dict:
        return
    made = vars(cls).get("__dataclass_params__")
    # One that has nothing to set, or nothing that its base does not have, may do without.
    if not made.frozen if made else _has_fields(cls) or _has_init(cls):
        raise TypeError(
            f"{cls.__qualname__}: a method is a frozen dataclass, put @dataclass(frozen=True) "
            "above the class"
        )
    if taken := [field.name for field in _fields(cls) if field.name in RESERVED]:
        raise TypeError(f"{cls.__qualname__}: {taken} cannot be fields of a method, rename them")


def _has_fields(cls: type) -> bool:
    """Whether a class names some in its body."""
    kinds = inspect.get_annotations(cls).values()
    return any("ClassVar" not in (kind if isinstance(kind, str) else repr(kind)) for kind in kinds)


def _has_init(cls: type) -> bool:
    """Whether its instances are made by an `__init__` that no dataclass has written."""
    owner = next(kind for kind in cls.__mro__ if "__init__" in vars(kind))
    return owner is not object and "__dataclass_params__" not in vars(owner)


def _fields(cls: type[Method]) -> tuple[Field[Any], ...]:
    return fields(cls) if is_dataclass(cls) else ()


def _ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _find(name: str, module: Any) -> type[Method]:
    """The method of that name; `module` is where it was when it was saved, if that is known."""
    if name in known_methods():
        return METHODS[name]
    where, colon, qualname = name.partition(":")
    if colon:
        module = where
        found = vars(sys.modules[where]).get(qualname) if where in sys.modules else None
        if isinstance(found, type) and issubclass(found, Method) and found.name == name:
            return found
    if module == "__main__":
        raise ValueError(f"there is no method {name!r} yet: run the script or cell that defines it")
    if isinstance(module, str) and module not in sys.modules:
        raise ValueError(
            f"there is no method {name!r} yet: import the module {shown(module)}, which has it, if "
            "you trust it"
        )
    raise ValueError(f"there is no method {shown(name)}; there are {sorted(METHODS)}")


def parse_settings(arguments: str, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """`FIELD=VALUE,...` of a command-line spec as keyword arguments; `readers` by field."""
    settings: dict[str, Any] = {}
    for pair in arguments.split(","):
        name, equals, value = pair.partition("=")
        if not equals or name not in readers:
            raise ValueError(f"expected FIELD=VALUE with one of {sorted(readers)}, got {pair!r}")
        if name in settings:
            raise ValueError(f"{name} is set twice in {arguments!r}")
        settings[name] = readers[name](value)
    return settings


def read_value(text: str) -> Any:
    """3, 0.5, true, none, several of them as 2+4, or a word."""
    words = {"none": None, "true": True, "false": False}
    if text in words:
        return words[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return tuple(map(read_value, text.split("+"))) if "+" in text else text


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
