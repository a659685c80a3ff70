"""Methods as short strings: `fastv:2:0.5` on a command line, or the path of a JSON file."""

from __future__ import annotations

from pathlib import Path

from .base import METHODS, Method

__all__ = ["load_method", "method_from_spec"]

FORMS = """\
  none                                the model as it is
  fastv[:LAYER[:KEEP]]                fastv:2:0.5
  lvpruning[:FOLDER[:RATIO,...]]      lvpruning:deciders:0.6,0.4,0.2
  pyramiddrop[:LAYER=KEEP,...]        pyramiddrop:8=0.5,16=0.25,24=0.125
  random[:KEEP[:LAYER[:SEED]]]        random:0.22
  schedule:LAYER=KEEP,...[:SCORE]     schedule:2=0.5,4=0.1
  visipruner[:FIELD=VALUE,...]        visipruner:fusion_threshold=0.99,stages=middle+deep
  inflection[:FIELD=VALUE,...]        inflection:source=attention,llm_layers=2+4,visual_keep=knee
  PATH.json                           a file written by method.save(path)
KEEP is a count (64) or a share of the visual tokens (0.5)."""


def load_method(path: str | Path) -> Method:
    """Read a method of any kind from a file that `save` wrote."""
    return Method.load(path)


def method_from_spec(spec: str) -> Method | None:
    """The method a short string stands for; None for "none", the model as it is.

    Raises ValueError, listing what there is, for anything it does not understand.
    """
    if spec == "none":
        return None
    if spec.endswith(".json"):
        return load_method(spec)
    name, colon, arguments = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}. Methods are written as\n{FORMS}")
    try:
        return METHODS[name].from_spec(arguments) if colon else METHODS[name]()
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {spec!r}: {error}. Methods are written as\n{FORMS}") from error
