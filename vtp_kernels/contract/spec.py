"""Methods as short strings: `fastv:2:0.5` on a command line, or the path of a JSON file."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from vtp_kernels._shown import shown

from .method import Method, known_methods

__all__ = ["load_method", "method", "method_from_spec", "method_of", "part_of_spec"]

FORMS = """\
  none                                the model as it is
  fastv[:LAYER[:KEEP[:PER]]]          fastv:2:0.5
  lvpruning[:FOLDER[:RATIO,...]]      lvpruning:deciders:0.6,0.4,0.2
  pyramiddrop[:LAYER=KEEP,...[:PER]]  pyramiddrop:8=0.5,16=0.25,24=0.125
  random[:KEEP[:LAYER[:SEED[:PER]]]]  random:0.22
  schedule:LAYER=KEEP,...[:SCORE[:PER]]
                                      schedule:2=0.5,4=0.1:text:frame
  visipruner[:FIELD=VALUE,...]        visipruner:fusion_threshold=0.99,stages=middle+deep
  inflection[:FIELD=VALUE,...]        inflection:source=attention,llm_layers=2+4,visual_keep=knee
  divprune[:FIELD=VALUE,...]          divprune:keep=64,per=picture
  cdpruner[:FIELD=VALUE,...]          cdpruner:keep=64
  framedifference[:FIELD=VALUE,...]   framedifference:keep=0.25
  vidcom2[:FIELD=VALUE,...]           vidcom2:keep=0.25,frames=pictures
  visionzip[:FIELD=VALUE,...]         visionzip:keep=64
  vispruner[:FIELD=VALUE,...]         vispruner:keep=64,important=0.5
  hiprune[:FIELD=VALUE,...]           hiprune:keep=64,middle=0.5
  dart[:FIELD=VALUE,...]              dart:layer=2,keep=64
  sparsevlm[:FIELD=VALUE,...]         sparsevlm:layers=2+6+15,keep=66+30+17
  PATH.json                           a file written by method.save(path)
  MODULE:CLASS[:FIELD=VALUE,...]      one of your own: my_package.my_methods:KeepLongest:keep=64
  chain:METHOD + METHOD[ + ...]       chain:divprune:keep=192 + fastv:2:0.5
KEEP is a count (64) or a share (0.5) of the visual tokens, PER prompt, picture or frame. The spaces
around the + between methods belong to it: without them it is part of a value (middle+deep)."""


def load_method(path: str | Path) -> Method:
    """Read a method of any kind from a file that `save` wrote."""
    return Method.load(path)


def method(spec: str) -> Method | None:
    """The method that a short string stands for; None for "none", the model as it is.

        vtp.method("fastv:2:0.5")                   vtp.FastV(layer=2, keep=0.5)
        vtp.method("method.json")                   what method.save("method.json") wrote
        vtp.method("my.module:KeepLongest:keep=8")  KeepLongest(keep=8), imported from my.module

    The last imports that module, so let nobody else write the string. A file is never a reason to
    import anything.

    Raises ValueError, listing what there is, for anything it does not understand; OSError for a
    file that cannot be read.
    """
    try:
        return _method(spec)
    except _NotWritten as error:
        raise ValueError(f"{error}. Methods are written as\n{FORMS}") from error


def part_of_spec(spec: str) -> Method | None:
    """The same for a spec within another, whose error says how methods are written."""
    return _method(spec)


class _NotWritten(ValueError):
    """A spec that nothing understands."""


def _method(spec: str) -> Method | None:
    if not isinstance(spec, str):
        raise TypeError(f"method: expected a string such as 'fastv:2:0.5', got {shown(spec)}")
    if spec == "none":
        return None
    name, colon, arguments = spec.partition(":")
    if name in known_methods():
        kind = known_methods()[name]
    elif own := OWN.fullmatch(spec):
        kind, arguments = _imported(own["module"], own["kind"]), own["arguments"]
        colon = arguments is not None
    elif spec.endswith(".json"):
        return load_method(spec)
    else:
        raise _NotWritten(f"there is no method {shown(name)}")
    try:
        return kind.from_spec(arguments) if colon else kind()
    except (TypeError, ValueError) as error:
        raise _NotWritten(f"method {spec!r}: {error}") from error


#: The same for code of this package, where `method` is what it returns.
method_from_spec = method

OWN = re.compile(
    r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<kind>[^\W\d]\w*)(:(?P<arguments>.*))?", re.DOTALL
)


def _imported(module: str, kind: str) -> type[Method]:
    """The method class of that name, from a module that whoever wrote the spec trusts."""
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"method: {module} cannot be imported: {error}") from error
        raise _NotWritten(
            f"there is no method {module!r}, and no module of that name from which {kind} could be "
            "imported: it must be on PYTHONPATH, or in the folder in which `python -m` is started"
        ) from error
    except Exception as error:
        raise ValueError(
            f"method: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        what = "nothing" if found is None else shown(found)
        raise ValueError(f"method: {module} has no method {kind}: that is {what}")
    return found


def method_of(method: Method | str) -> Method:
    """What is given as a method, where there has to be one: itself, or what its spec stands for."""
    if isinstance(method, str):
        found = method_from_spec(method)
        if found is None:
            raise ValueError('method: "none" is the model as it is, there is nothing to apply')
        return found
    if not isinstance(method, Method):
        hint = ""
        if isinstance(method, type) and issubclass(method, Method):
            hint = f"; make one of it: {method.__name__}(...)"
        raise TypeError(
            "method: expected a Method, or a string such as 'fastv:2:0.5' that stands for one; got "
            f"{shown(method)}{hint}"
        )
    return method
