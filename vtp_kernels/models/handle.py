"""`apply` and `prune`: a method at work in a model, until it is removed."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import nn

from vtp_kernels.methods import METHODS, Method, method_of
from vtp_kernels.ops._dispatch import choose

from .engine import ENGINE_OPS, Engine
from .families import FAMILIES, parts_of
from .limits import check_method
from .positions import POSITIONS
from .report import Report
from .towers import TOWERS

__all__ = ["Handle", "apply", "prune", "supported_models"]

_pruned_models: WeakSet[nn.Module] = WeakSet()
_lock = threading.Lock()


class Handle:
    """A method at work in a model. As a context manager it removes itself at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.method = engine.method

    def report(self) -> Report:
        """What happened in the last forward pass that brought images.

        Waits for the GPU. Raises RuntimeError if there was no such pass yet.
        """
        record = self._engine.last_prefill
        if record is None:
            raise RuntimeError("nothing to report: no call with images has run yet")
        return record.report()

    def remove(self) -> None:
        """Take the method out of the model, which then is as it was before. Twice is fine."""
        with _lock:
            self._engine.detach()
            _pruned_models.discard(self._engine.parts.text)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def apply(
    model: nn.Module,
    method: Method,
    *,
    positions: str = "original",
    backend: str | None = None,
) -> Handle:
    """Prune visual tokens in every call of `model` that brings images, until `remove()`.

    Works by hooks: `model.generate(...)` and `model(...)` stay as they are, with any batch (left
    padding, any number of images per prompt or none), cache, sampling, beams and attention
    implementation but those named below. Without a cache, every step of generate() is a prompt of
    its own and chooses anew. Where ranks share a model's heads (tensor parallelism by DTensors, as
    transformers does it) apply on every rank: all keep the same tokens.

    Parameters
    ----------
    model : a transformers model of a supported family, see `supported_models()`
    method : VisiPruner, LVPruning, InflectionPruning, FastV, PyramidDrop, RandomPruning, Schedule,
        or a Method of your own
    positions : "original" | "contiguous"
        Rows that stay keep their positions, and generated tokens continue after the unpruned
        length; or rows close up, in each layer after the rows that layer has.
    backend : None | "native" | "triton" | "reference"
        For the ops, as everywhere in this package.

    Raises
    ------
    NotImplementedError
        If the model is not supported, its family cannot run the method or those positions, or
        `backend` cannot serve it. Later, in calls with images: flex_attention, quantized,
        sliding-window or offloaded caches, 4D masks, packed sequences, a static cache where layers
        are to forget visual tokens.
    ValueError
        If the method does not fit the model (a layer it does not have), the model is pruned
        already, or `backend` is unknown. Later, in calls with images: labels, output_attentions,
        prefill_chunk_size, right padding. With output_hidden_states, later layers have fewer rows.
    """
    method = method_of(method)
    if positions not in POSITIONS:
        raise ValueError(f"positions: got {positions!r}, expected one of {POSITIONS}")
    parts = parts_of(model)
    check_method(parts, method, positions)
    for op in ENGINE_OPS:
        choose(op, next(parts.text.parameters()), backend)
    engine = Engine(parts, method, positions, backend)
    with _lock:
        if parts.text in _pruned_models:
            raise ValueError(
                "model: a method is at work in this model already; remove() it before applying "
                "another"
            )
        engine.attach()
        _pruned_models.add(parts.text)
    return Handle(engine)


def prune(
    model: nn.Module,
    method: Method,
    *,
    positions: str = "original",
    backend: str | None = None,
) -> Handle:
    """`apply` for a `with` block:

    with vtp.prune(model, vtp.FastV(layer=2, keep=0.5)) as run:
        model.generate(**inputs)
    print(run.report())
    """
    return apply(model, method, positions=positions, backend=backend)


def supported_models() -> dict[str, dict[str, Any]]:
    """Families of models, and what each can run.

    Returns
    -------
    {family: dict}
        architectures, text_models : class names, and `model_type` of the language models in them.
        methods : names of methods, as in their files.
        positions : what `positions` of `apply` may be.
        vision_tower : whether methods that look at what the vision tower saw find it
            (InflectionPruning does, but for source=None).
        limits : what else does not go, in words.
    """
    return {
        name: {
            "architectures": list(family.architectures),
            "text_models": list(family.text_models),
            "methods": sorted(METHODS),
            "positions": list(family.positions),
            "vision_tower": name in TOWERS,
            "limits": list(family.limits),
        }
        for name, family in FAMILIES.items()
    }
