"""lmms-eval's classes, pruned: `SimpleLlavaHf` is its LlavaHf for tasks that give it a text and
pictures, `ChatLlavaHf` that for tasks that give it messages. Each is made when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from . import ORIGINALS
from .pruned import Pruned
from .served import Served


def __getattr__(name: str) -> Any:
    for model, (original, kinds) in ORIGINALS.items():
        for kind in kinds:
            if name == f"{kind.title()}{original}":
                module = importlib.import_module(f"lmms_eval.models.{kind}.{model}")
                first = Served if model == "vllm" else Pruned
                bases = (first, getattr(module, original))
                made = type(name, bases, {"__doc__": first.__doc__, "__module__": __name__})
                return globals().setdefault(name, made)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
