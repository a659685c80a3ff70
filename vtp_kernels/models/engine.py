"""The hooks. They attach to a model, find out what kind of call runs, and hand it its rows.

Rows leave by removable hooks alone: no forward is replaced, no parameter is added. Only where
visual tokens are to be passive, or rows may come without the padding between them, does a module
stand in for a layer's attention, with the very same children. A call with images is a `Prefill`,
one that goes on from a pruned cache a `Continuation`; both travel through the model in its keyword
arguments under CALL and are taken out before a layer sees them. Every other call passes untouched.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import Tensor, nn

from vtp_kernels.methods.base import Method

from .attention import PackedAttention, PassiveVisualAttention, SomeRowsAttention
from .cache import PrunedCache
from .continuation import Continuation
from .families import ModelParts
from .prefill import Prefill
from .report import PrefillRecord
from .towers import MODELS, TOWERS, tower_of
from .vision import VisionWatch

__all__ = ["ENGINE_OPS", "Engine"]

CALL = "vtp_call"

# What a prefill calls, in prefill.py, rows.py, vision.py and attention.py; all take the handle's
# backend.
ENGINE_OPS = (
    "attention_scores",
    "select_topk",
    "compact_rows",
    "compact_kv",
    "token_contribution",
    "passive_attention",
    "inflection",
    "cls_inflection",
)


class Engine:
    """A method at work in a model."""

    def __init__(
        self, parts: ModelParts, method: Method, positions: str, backend: str | None
    ) -> None:
        self.parts, self.method, self.positions, self.backend = parts, method, positions, backend
        depth = len(parts.layers)
        self.observed_layers = frozenset(method.observed_layers(depth))
        self.passive_layers = dict(method.passive_layers(depth))
        first = min(method.decision_layers(depth), default=depth)
        self.packed_layers = frozenset(range(first, depth)) - self.passive_layers.keys()
        self.watch: VisionWatch | None = None
        if method.vision_source() is not None:
            tower = tower_of(parts.family, parts.base)
            if tower is None:
                raise NotImplementedError(
                    f"{parts.family} cannot run {method}: what its vision tower sees is not known "
                    f"here. It is for {', '.join(TOWERS)} with a tower of {', '.join(MODELS)}"
                )
            if method.vision_source() == "attention" and not tower.attentions:
                raise NotImplementedError(
                    f"{parts.family} cannot run {method}: the attention in its vision tower is not "
                    "known here; use source='similarity'"
                )
            self.watch = VisionWatch(parts.base, tower, method.vision_source(), backend)
        self.last_prefill: PrefillRecord | None = None
        self._hooks: list[Any] = []
        self._replaced: list[tuple[nn.Module, nn.Module]] = []  # layers, and their own attention

    def attach(self) -> None:
        parts, hooks = self.parts, self._hooks
        for module in (parts.top, parts.base):
            before = functools.partial(self._before_model, _parameters(module))
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if self.watch is not None:
            self.watch.attach()
            before, after = self._before_pictures, self._after_pictures
            hooks.append(parts.base.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(parts.base.register_forward_hook(after, always_call=True))
        hooks.append(
            parts.text.register_forward_pre_hook(
                functools.partial(self._before_text, _parameters(parts.text)), with_kwargs=True
            )
        )
        hooks.append(parts.text.register_forward_hook(self._after_text, with_kwargs=True))
        for index, layer in enumerate(parts.layers):
            before = functools.partial(self._before_layer, index)
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            if index in self.passive_layers or index in self.packed_layers:
                self._replaced.append((layer, layer.self_attn))
                layer.self_attn = self._stand_in(index, layer.self_attn)
            if index in self.packed_layers:
                after = self._after_layer  # before other hooks, which are to see the batch
                hooks.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))
            if index in self.observed_layers or index in self.passive_layers:
                before = functools.partial(self._before_attention, index)
                hooks.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        _forget_compiled_code()

    def detach(self) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.watch is not None:
            self.watch.detach()
        for layer, attention in self._replaced:
            layer.self_attn = attention
        self._replaced.clear()
        _forget_compiled_code()

    def _stand_in(self, layer: int, attention: nn.Module) -> nn.Module:
        passive = self.passive_layers.get(layer)
        if passive is None:
            return PackedAttention(attention)
        if passive.leaves_one:
            return SomeRowsAttention(attention, self.backend)
        return PassiveVisualAttention(attention, passive, self.backend)

    # ---- hooks, from the outside in -----------------------------------------------------------

    def _before_model(
        self, parameters: list[str], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        if CALL in kwargs:
            return None
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        if not self.parts.has_images(arguments):
            return None
        call = Prefill(self.parts, self.method, self.positions, self.backend, arguments)
        if not any(call.visual_at_start):
            return None
        kwargs[CALL] = call
        return args, kwargs

    def _before_pictures(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.watch.expect(kwargs.get(CALL))

    def _after_pictures(self, module: nn.Module, args: Any, output: Any) -> None:
        self.watch.expect(None)

    def _before_text(self, parameters: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if CALL in kwargs:
            return None
        arguments = dict(zip(parameters, args, strict=False)) | kwargs if args else kwargs
        cache = arguments.get("past_key_values")
        if not isinstance(cache, PrunedCache):
            return None
        call = Continuation.open(self.parts, cache, arguments)
        if call is None:
            return None
        kwargs[CALL] = call
        return args, kwargs

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = kwargs.get(CALL)
        if call is None:
            return None
        looks = index in self.observed_layers or index in self.passive_layers
        if not (looks and isinstance(call, Prefill)):  # else the layer hands it to its attention
            del kwargs[CALL]
        if args:
            return (call.enter(index, args[0], kwargs), *args[1:]), kwargs
        kwargs["hidden_states"] = call.enter(index, kwargs["hidden_states"], kwargs)
        return args, kwargs

    def _before_attention(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            return None
        if index in self.observed_layers:
            call.observe(module, kwargs)
        if index in self.passive_layers:
            kwargs.update(call.passive_inputs(index))
        return args, kwargs

    def _after_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        packing = kwargs.get("packing")
        return None if packing is None else packing.unpack(output)

    def _after_text(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = kwargs.get(CALL)
        if isinstance(call, Prefill):
            self.last_prefill = call.finish()


def _parameters(module: nn.Module) -> list[str]:
    """Names of forward's parameters, for arguments passed by position."""
    return list(inspect.signature(module.forward).parameters)


def _forget_compiled_code() -> None:
    """Compiled code does not notice hooks that come or go: Dynamo leaves them out of its guards."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
