"""What makes a model of lmms-eval a pruned one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vtp_kernels.methods import method_from_spec
from vtp_kernels.models import apply

__all__ = ["Pruned"]


class Pruned:
    """Put in front of a model class of lmms-eval whose `model` is one of transformers.

    Takes, besides that class's arguments, `vtp`: a method as a JSON file or a short form, or "none"
    for the model as it is. What cannot be pruned ends the evaluation: log-likelihoods, for one,
    need the logits of rows that left.
    """

    def __init__(self, *args: Any, vtp: str, **kwargs: Any) -> None:
        method = method_from_spec(vtp)
        super().__init__(*args, **kwargs)
        self.vtp = None if method is None else apply(self.model, method)

    def generate_until(self, requests: Any) -> Any:
        with _failures_raise(self.model):
            return super().generate_until(requests)


class _Failure(BaseException):
    """Passes an `except Exception`."""


@contextmanager
def _failures_raise(model: Any) -> Iterator[None]:
    """Let through what generate() raises. lmms-eval takes it for an empty answer, and goes on: what
    was refused would be scored as if the method had forgotten what it saw."""
    generate = model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            raise _Failure from error

    model.generate = watched
    try:
        yield
    except _Failure as failure:
        raise failure.__cause__ from None
    finally:
        del model.generate
