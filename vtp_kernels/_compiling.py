"""What torch.compile is to know of functions here, said without loading it: that takes longer than
all else that is imported."""

from collections.abc import Callable
from typing import TypeVar

__all__ = ["constant"]

Function = TypeVar("Function", bound=Callable)


def constant(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`, which does this and loads Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
