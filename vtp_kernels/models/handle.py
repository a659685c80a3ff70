"""`apply` and `prune`: a method at work in a model, until it is removed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import transformers
from torch import nn

from vtp_kernels._shown import shown
from vtp_kernels.contract.method import Method, known_methods
from vtp_kernels.contract.spec import method_of
from vtp_kernels.ops._dispatch import choose

from .checks.text_check import check_text_model
from .families import FAMILIES, parts_of
from .keys.positions import POSITIONS
from .modules.placement import like_hidden
from .passage.compiled import check_compiled
from .passage.engine import ENGINE_OPS, Engine
from .passage.limits import check_method
from .reports.report import PrefillRecord, Report

__all__ = ["OUTPUT_ROWS", "Handle", "apply", "handle", "prune", "remove", "supported_models"]

OUTPUT_ROWS = ("kept", "input")

# By the decoder stack they are at work in. A handle lives as long as the hooks in the model do.
_handles: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class NothingToReport(RuntimeError):
    """No call with images has run yet."""


class Handle:
    """A method at work in a model. As a context manager it removes itself at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine  # None once removed: it holds the model
        self._last: PrefillRecord | None = None  # of the engine that is gone
        self.method = engine.method

    def report(self) -> Report:
        """What happened in the last forward pass that brought images.

        Waits for the GPU. Raises RuntimeError if there was no such pass yet.
        """
        engine = self._engine
        record = self._last if engine is None else engine.last_prefill
        if record is None:
            raise NothingToReport("nothing to report: no call with images has run yet")
        return record.report()

    def compile(
        self,
        lengths: Sequence[int],
        inputs: Mapping[str, Any] | None = None,
        *,
        mode: str | None = None,
        backend: str = "inductor",
        most: int = 32,
    ) -> None:
        """Run the decoder stack of calls with images as one compiled graph, padded on the left to
        the next of `lengths`.

        Between the merged embeddings and the last hidden state nothing waits for the host then.
        Results are those of the method uncompiled, up to rounding, and so is the KV cache that is
        left; decoding, further turns and calls without images run as ever. Code is made for each
        length, batch and numbers of visual tokens when a call first needs it, or ahead for
        `inputs`. Calling it again replaces what was compiled; `remove()` ends it.

        `report().compiled` tells how the last call ran and what memory is held. A call runs
        uncompiled, too, where it goes on from a cache that holds rows, brings videos, asks for
        hidden states of the layers or for logits by a tensor of indices, needs gradients, and in
        models whose pictures see what is behind them.

        Parameters
        ----------
        lengths : ints
            Rows of a prompt, visual tokens included, that code is made for. Longer prompts run
            uncompiled.
        inputs : what a processor gives for one batch of prompts with images, on the model's device
            Code is made ahead for its batch and its numbers of visual tokens, at every length that
            it fits; a bar shows how far this is.
        mode : None | "reduce-overhead" | "max-autotune" | "max-autotune-no-cudagraphs"
            Of torch.compile. The second and third run as CUDA graphs on a GPU.
        backend : str
            Of torch.compile.
        most : int
            As many pairs of a length and a batch's numbers of visual tokens are compiled; calls
            that would be one more run uncompiled.

        Raises
        ------
        NotImplementedError
            For methods that decide by data how many rows stay (VisiPruner but for decision="fixed",
            InflectionPruning with a knee), for attention other than sdpa and eager, and for layers
            with sliding windows or linear attention.
        TypeError, ValueError
            For lengths that are no ascending ints above 0, `most` below their number, and `inputs`
            longer than all of them or without images.
        """
        engine = self._engine
        if engine is None:
            raise RuntimeError("this handle was removed: there is nothing to compile")
        lengths = _lengths(lengths)
        if not isinstance(most, int) or most < len(lengths):
            raise ValueError(f"most: expected at least {len(lengths)}, the lengths, got {most!r}")
        check_compiled(engine.parts, self.method)
        text = engine.compile(lengths, most, {"mode": mode, "backend": backend})
        if inputs is None:
            return
        try:
            text.ahead(engine.parts.top, inputs)
        except BaseException:
            engine.uncompile()
            raise

    def remove(self) -> None:
        """Take the method out of the model, which then is as it was before. Twice is fine."""
        with _lock:
            engine = self._engine
            if engine is None:
                return
            engine.detach()
            del _handles[engine.parts.text]
            self._last, self._engine = engine.last_prefill, None

    def __enter__(self) -> Handle:
        if self._engine is None:
            raise RuntimeError(
                "this handle was removed, and its method is no longer at work: begin with "
                "vtp.prune(model, method) again"
            )
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
    method: Method | str,
    *,
    positions: str = "original",
    backend: str | None = None,
    output_rows: str = "kept",
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
        Or a wrapper around one: of peft, torch.compile, DistributedDataParallel. Its weights may be
        quantized, and offloaded by accelerate.
    method : one of `vtp_kernels.methods`, as FastV, or a Chain of several, or a Method of your own
        Or a string that stands for one, as `vtp.method` reads it.
    positions : "original" | "contiguous"
        Rows that stay keep their positions, and generated tokens continue after the unpruned
        length; or rows close up, in each layer after the rows that layer has.
    backend : None | "native" | "triton" | "reference"
        For the ops, as everywhere in this package.
    output_rows : "kept" | "input"
        What `model(**inputs).logits` and `last_hidden_state` have in a call of your own that brings
        images and asks for all logits: a row for each row that is left, [B, K, V], each prompt's at
        its end with any padding in front; or one for each row of the input, [B, S, V], in which
        rows that left are NaN, for code that finds its rows by counting from the front. generate()
        and logits_to_keep=N (the last N rows) are the same in both. Given a tensor of indices,
        logits_to_keep means rows of the input, and these stay.

    Raises
    ------
    NotImplementedError
        If the model is not supported, its text model computes something else than is computed here
        (the message says what), its family cannot run the method or those positions, or `backend`
        cannot serve it; for DataParallel on several devices, and where a method looks at a layer
        whose weights are taken away when it has run (FSDP of single layers, accelerate's
        preload_module_classes); where a method changes what layers with a sliding window attend to.
        Later, in calls with images: 4D masks, packed sequences, flex_attention with a static cache,
        FlashAttention in Ministral 3, a static, quantized or offloaded cache where layers are to
        forget visual tokens; where prompt and answer exceed a sliding window: a static cache, and
        FlashAttention; and where layers have linear attention: several prompts on top of a cache.
    ValueError
        If the method does not fit the model (a layer it does not have, or whose attention is linear
        and has no weights to look at), the model is pruned already, or `backend` is unknown. Later,
        in calls with images: labels, output_attentions, prefill_chunk_size, right padding. With
        output_hidden_states, later layers have fewer rows.
    """
    method = method_of(method)
    if positions not in POSITIONS:
        raise ValueError(f"positions: got {shown(positions)}, expected one of {POSITIONS}")
    if output_rows not in OUTPUT_ROWS:
        raise ValueError(f"output_rows: got {shown(output_rows)}, expected one of {OUTPUT_ROWS}")
    parts = parts_of(model)
    check_text_model(parts.text, parts.page.row_arguments, parts.page.may_be_acausal)
    check_method(parts, method, positions)
    hidden = like_hidden(parts.text)
    for op in (*ENGINE_OPS, *method.needs_ops()):
        choose(op, hidden, backend)
    with _lock:
        if parts.text in _handles:
            raise ValueError(
                "model: a method is at work in this model already; remove() it before applying "
                "another (vtp.remove(model), if its handle is lost)"
            )
        engine = Engine(parts, method, positions, backend, output_rows)
        engine.handle = Handle(engine)
        engine.attach()
        _handles[parts.text] = weakref.ref(engine.handle)
    return engine.handle


def _lengths(lengths: object) -> tuple[int, ...]:
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths: expected ints, got {shown(lengths)}")
    if any(isinstance(length, bool) or not isinstance(length, int) for length in lengths):
        raise TypeError(f"lengths: expected ints, got {shown(lengths)}")
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(f"lengths: expected ascending numbers above 0, got {shown(lengths)}")
    return tuple(lengths)


def handle(model: nn.Module) -> Handle | None:
    """The handle of the method that is at work in `model`, None if there is none.

    `model` is what `apply` takes, or a wrapper around it. A copy of a pruned model is a dense one.
    """
    reference = _handles.get(parts_of(model).text)
    return None if reference is None else reference()


def remove(model: nn.Module) -> None:
    """Take the method that is at work out of `model`; nothing happens if there is none."""
    found = handle(model)
    if found is not None:
        found.remove()


def prune(
    model: nn.Module,
    method: Method | str,
    *,
    positions: str = "original",
    backend: str | None = None,
    output_rows: str = "kept",
) -> Handle:
    """`apply` for a `with` block, which ends with `remove()`. The method is at work from this call
    on, not from `with` on:

    with vtp.prune(model, vtp.FastV(layer=2, keep=0.5)) as run:
        model.generate(**inputs)
    print(run.report())
    """
    return apply(model, method, positions=positions, backend=backend, output_rows=output_rows)


def supported_models() -> dict[str, dict[str, Any]]:
    """Families of models, and what each can run. `python -m vtp_kernels models` prints them.

    Returns
    -------
    {family: dict}
        With

        * `architectures`: class names.
        * `available`: those of them that the installed transformers has.
        * `transformers`: the oldest version that the family works with, as far as was tried.
        * `example`: a checkpoint on the Hugging Face hub.
        * `text_models`: `model_type` of the language models in them that it is tested with. Any
          other is tried when a method is applied, and taken if what it computes is what is
          computed here, or refused with what differs.
        * `methods`: names of methods, as in their files. Those that always ask the vision tower
          for something are not among them where it is not known to give that.
        * `layers`: before which layers visual tokens may leave, in words.
        * `positions`: what `positions` of `apply` may be.
        * `vision_tower`: whether methods that look at what the vision tower saw find it
          (InflectionPruning does, but for source=None; VisionZip, VisPruner and HiPrune).
        * `tower_scores`: what of the tower scores tokens, as InflectionPruning's source.
        * `tower_videos`: whether frames of videos are seen as pictures are.
        * `limits`: what else does not go, in words.
    """
    return {
        name: {
            "architectures": list(family.architectures),
            "available": [x for x in family.architectures if hasattr(transformers, x)],
            "transformers": family.since,
            "example": vars(type(family)).get("example", ""),  # a base page's is of that one
            "text_models": list(family.text_models),
            "methods": sorted(
                name
                for name, kind in known_methods().items()
                if not kind.needs_tower
                or any(tower.gives().issuperset(kind.needs_tower) for tower in family.towers)
            ),
            "layers": family.leave_before,
            "positions": list(family.positions),
            "vision_tower": bool(family.towers),
            "tower_scores": list(dict.fromkeys(x for t in family.towers for x in t.scores)),
            "tower_videos": any(tower.videos for tower in family.towers),
            "limits": list(family.limits),
        }
        for name, family in FAMILIES.items()
    }
