"""Attributes and hooks that a method needs in a model, and what becomes of them in copies of it.

While a method is at work, some modules have an attribute that hides a method of their class. The
module itself stays where it is, with its children, its hooks and its mode, so whatever else is done
to it meanwhile (adapters, quantization, `train()`) is done to the module that runs.

A copy of such a model, by `copy.deepcopy` or through a file, is a model without a method.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from torch import nn

__all__ = ["NamingShadow", "Shadow", "StaysBehind"]


class StaysBehind:
    """Something whose methods are hooks. A copy of the model gets an idle one: its hooks must do
    nothing then."""

    idle = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _idle(type(self))

    def __reduce__(self) -> tuple:
        return _idle, (type(self),)


def _idle(kind: type) -> Any:
    stayed = object.__new__(kind)
    stayed.idle = True
    return stayed


class Shadow:
    """Put in front of a module's method `name`, which is then `original`, until it is removed.

    Subclasses say what happens by `__call__`. In a copy of the module the method itself is back.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name)  # None: the method of its class
        self.original = getattr(module, name)
        # For whoever asks for the signature.
        functools.update_wrapper(self, self.original, updated=())

    def put(self) -> None:
        setattr(self.module, self.name, self)

    def remove(self) -> None:
        """Give back what was there, unless somebody has put something else in front meanwhile: that
        stays, and whatever it calls here goes on to the original."""
        if vars(self.module).get(self.name) is not self:
            return
        delattr(self.module, self.name)
        if self.before is not None:
            setattr(self.module, self.name, self.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return getattr(copy.deepcopy(self.module, memo), self.name)

    def __reduce__(self) -> tuple:
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.module, self.name)


class NamingShadow(Shadow):
    """One that looks at arguments by their names."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.signature = inspect.signature(self.original)

    def by_name(self, args: Any, kwargs: Any) -> dict[str, Any]:
        if "kwargs" not in self.signature.parameters:
            # Some have it of a decorator, of which their signature does not tell.
            kwargs = {name: x for name, x in kwargs.items() if name != "return_dict"}
        given = self.signature.bind(*args, **kwargs).arguments
        return given | given.pop("kwargs", {})


def _same(x: Any) -> Any:
    return x
