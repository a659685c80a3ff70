"""The hooks. They attach to a model, find out what kind of call runs, and hand it its rows.

Rows leave by removable hooks alone: no module is replaced, no parameter is added. Where a layer's
attention is observed, or is to do something of its own, a shadow stands in front of its forward. A
call with images is a `Prefill`, one that goes on from a pruned cache a `Continuation`; both travel
through the model in its keyword arguments under CALL and are taken out before anything else sees
them. Every other call passes untouched.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.backends import Backends
from vtp_kernels.contract.method import Method

from ..attention.projections import has_these_steps
from ..attention.stand_ins import (
    CALL,
    AttentionShadow,
    PackedAttention,
    PassiveVisualAttention,
    SomeRowsAttention,
    StandIn,
)
from ..families import ModelParts
from ..keys.cache import AtWork, PrunedCache, is_static
from ..modules.onlookers import is_known_forward, others_look_into
from ..modules.shadow import StaysBehind
from ..modules.unwrapping import passed_to, refuse_replicas
from ..pictures.encoding import LayoutNotes
from ..pictures.watch import VisionWatch
from ..reports.report import PrefillRecord
from .asked import takes_logits_to_keep
from .compiled import CompiledText, forget_compiled_code
from .continuation import Continuation
from .plan import Plan
from .prefill import Prefill

__all__ = ["ENGINE_OPS", "Engine"]

# What a prefill calls, in prefill.py, rows.py, vision.py and attention.py; all take the handle's
# backend.
ENGINE_OPS = (
    "attention_scores",
    "attention_topk",
    "select_topk",
    "compact_rows",
    "compact_kv",
    "token_contribution",
    "passive_attention",
    "inflection",
    "cls_inflection",
)


class Engine(StaysBehind):
    """A method at work in a model."""

    def __init__(
        self,
        parts: ModelParts,
        method: Method,
        positions: str,
        backend: str | None,
        output_rows: str,
    ) -> None:
        self.parts, self.method, self.positions = parts, method, positions
        self.backend, self.backends = backend, Backends(backend)
        self.output_rows = output_rows
        depth = len(parts.layers)
        self.plan = Plan.of(method, depth, parts.linear)
        self.first_decision = min(self.plan.decisions, default=depth)
        unpacked = frozenset(range(self.first_decision))
        self.packed_layers = frozenset(range(depth)) - unpacked - self.plan.passive.keys()
        self._check_forwards()
        self.notes = LayoutNotes(parts)
        self.watch: VisionWatch | None = None
        if self.plan.sees_pictures:
            tower = parts.page.tower(parts.base)
            if tower is None:
                models = [model for kind in parts.page.towers for model in kind.models]
                known = ", ".join(models) or "none of this family"
                raise NotImplementedError(
                    f"{parts.family} cannot run {method}: what its vision tower sees is not known "
                    f"here. Known are {known}, built as transformers builds them"
                )
            try:
                self.watch = VisionWatch(parts.base, tower, method.vision_source(), backend)
            except NotImplementedError as error:
                raise NotImplementedError(f"{parts.family} cannot run {method}: {error}") from error
            if missing := [x for x in method.needs_tower if x not in tower.gives()]:
                raise NotImplementedError(
                    f"{parts.family} cannot run {method}: its vision tower is not known to give "
                    f"{', '.join(missing)}"
                )
        self.last_prefill: PrefillRecord | None = None
        self.handle: Any = None  # whoever applied the method finds it again by the model
        self.shadows: dict[int, AttentionShadow] = {}  # by layer
        self.at_work = AtWork()
        self.compiled: CompiledText | None = None
        self._packing: set[int] = set()  # layers that are ready for packed rows
        self._lock = threading.Lock()
        self._hooks: list[Any] = []
        self._warned = False

    def _check_forwards(self) -> None:
        for layer, passive in self.plan.passive.items():
            attention = self.parts.layers[layer].self_attn
            if not passive.leaves_one and not is_known_forward(attention):
                raise NotImplementedError(
                    f"layer {layer}: the forward of its self_attn was replaced by one of your own, "
                    f"and {type(self.method).__name__} computes another attention there, in which "
                    "visual tokens are passive; put yours on after the method, so that it calls "
                    "what it finds, or leave these layers alone"
                )

    def attach(self) -> None:
        parts, hooks = self.parts, self._hooks
        for module in (parts.top, parts.base, parts.text, *parts.layers):
            _forget_copied_hooks(module)
        for module in (parts.top, parts.base):
            before = functools.partial(self._before_model, _parameters(module))
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(parts.base.register_forward_hook(self._after_base, with_kwargs=True))
        self.notes.attach()
        if self.watch is not None:
            self.watch.attach()
            before, after = self._before_pictures, self._after_pictures
            hooks.append(parts.base.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(parts.base.register_forward_hook(after, always_call=True))
        before = functools.partial(self._before_text, _parameters(parts.text))
        hooks.append(parts.text.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(
            parts.text.register_forward_hook(self._after_text, with_kwargs=True, always_call=True)
        )
        for index, layer in enumerate(parts.layers):
            before = functools.partial(self._before_layer, index)
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            if index in self.plan.watched:
                self._put_shadow(index)
        forget_compiled_code()

    def detach(self) -> None:
        if not self._hooks:
            return
        self.uncompile()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.watch is not None:
            self.watch.detach()
        self.notes.detach()
        for shadow in self.shadows.values():
            shadow.remove()
        self.shadows.clear()
        self._packing.clear()
        self.at_work.on = False
        forget_compiled_code()

    def compile(self, lengths: tuple[int, ...], most: int, options: dict[str, Any]) -> CompiledText:
        """Put one in front of the decoder stack, in the place of the one that is."""
        self.uncompile()
        self.compiled = CompiledText(self.parts, lengths, most, options)
        self.compiled.put()
        return self.compiled

    def uncompile(self) -> None:
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None
            forget_compiled_code()

    def may_pack(self, index: int) -> bool:
        """Whether rows may come to a layer without the padding between them.

        What that takes is put into the layer when it is first asked for: calls with one prompt, or
        with prompts that keep alike, go without.
        """
        layer = self.parts.layers[index]
        if self.compiled is not None:  # its code would have to be made anew
            return False
        if index in self.parts.linear or not has_these_steps(layer.self_attn):
            return False
        with self._lock:
            if index not in self._packing:
                if torch.compiler.is_compiling():
                    return False
                if index not in self.shadows:
                    self._put_shadow(index)
                after = self._after_layer  # before other hooks, which are to see the batch
                self._hooks.append(
                    layer.register_forward_hook(after, prepend=True, with_kwargs=True)
                )
                self._packing.add(index)
                forget_compiled_code()
        return not others_look_into(layer)

    def _put_shadow(self, index: int) -> None:
        attention = self.parts.layers[index].self_attn
        stand_in = self._stand_in(index, attention)
        self.shadows[index] = AttentionShadow(attention, index, stand_in)
        self.shadows[index].put()

    def _stand_in(self, layer: int, attention: nn.Module) -> StandIn | None:
        passive = self.plan.passive.get(layer)
        if passive is None:
            return PackedAttention(attention) if layer in self.packed_layers else None
        if passive.leaves_one:
            return SomeRowsAttention(attention, self.backend)
        return PassiveVisualAttention(attention, passive, self.backend)

    # ---- hooks, from the outside in -----------------------------------------------------------

    def _before_model(
        self, parameters: list[str], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        if self.idle or CALL in kwargs:
            return None
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        if not self.parts.has_images(arguments):
            self._warn_of_embeddings(arguments)
            return self._go_on(arguments, args, kwargs)
        refuse_replicas(module)
        if module is self.parts.base:  # the hook on `top` was passed over, or all rows come out
            arguments = {**arguments, "logits_to_keep": 0, **passed_to(self.parts.top)}
        if not takes_logits_to_keep(type(self.parts.top)):
            if isinstance(arguments.get("logits_to_keep"), Tensor):
                raise NotImplementedError(
                    f"logits_to_keep: the forward of {type(self.parts.top).__name__} knows none, "
                    "and gives the logits of all rows that are left, among which an index means "
                    "another row; use output_rows='input'"
                )
            arguments["logits_to_keep"] = 0
        call = Prefill(self, arguments)
        if not any(call.visual_at_start):
            return self._go_on(arguments, args, kwargs)
        kwargs[CALL] = call
        return args, kwargs

    def _go_on(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """A call that goes on from a pruned cache. It is looked at from the outside, for some
        models make the masks of their layers before they call the decoder stack, which then does
        not know the call's own. With a static cache generate() has made them already; then the
        stack is early enough, and compiled steps stay one graph."""
        cache = arguments.get("past_key_values")
        if not isinstance(cache, PrunedCache) or is_static(cache):
            return None
        kwargs[CALL] = Continuation(self.parts, cache, arguments)
        return args, kwargs

    def _warn_of_embeddings(self, arguments: dict[str, Any]) -> None:
        """Embeddings into which pictures were merged already look like any others."""
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None or self._warned or arguments.get("input_ids") is not None:
            return
        cache = arguments.get("past_key_values")
        if embeddings.shape[1] > 1 and not isinstance(cache, PrunedCache):
            self._warned = True
            warnings.warn(
                "inputs_embeds came without pixel values. If pictures are merged into them, "
                "nothing tells which rows these are, and nothing is pruned: pass pixel_values, and "
                "in inputs_embeds the embedding of the image token where their features go. (This "
                "is said once.)",
                stacklevel=2,
            )

    def _before_pictures(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.idle:
            self.watch.expect(kwargs.get(CALL))

    def _after_pictures(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.idle:
            self.watch.expect(None)

    def _before_text(self, parameters: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.idle:
            return None
        arguments = dict(zip(parameters, args, strict=False)) | kwargs if args else kwargs
        call = kwargs.get(CALL)
        if isinstance(call, Prefill):
            call.begin(kwargs)
        cache = arguments.get("past_key_values")
        if not isinstance(cache, PrunedCache):
            return None
        if call is None:
            kwargs[CALL] = Continuation(self.parts, cache, arguments)
        cache.vtp.served = self.at_work
        return args, kwargs

    def _before_layer(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = kwargs.get(CALL)
        if call is None:
            return None
        if self.idle:
            raise RuntimeError(
                f"layer {index} is a copy, made while a method was at work in the model: copies "
                "are without it. remove() the method, and apply it anew to the model as it is now"
            )
        hidden = call.enter(index, args[0] if args else kwargs["hidden_states"], kwargs)
        if not (index in self.shadows and isinstance(call, Prefill)):
            del kwargs[CALL]  # else the layer hands it to its attention
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _after_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        call = kwargs.get(CALL)
        return None if call is None or call.packed is None else call.packed.unpack(output)

    def _after_text(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = kwargs.get(CALL)
        if call is None:
            return None
        if isinstance(call.cache, PrunedCache):
            call.cache.vtp.served = None
        if not isinstance(call, Prefill) or output is None:  # None: it broke off
            return None
        if torch.compiler.is_compiling():  # the hooks of the decoder stack, along with it
            call.left_open = True
        else:
            self.last_prefill = call.finish()
        if not (call.asked.by_index or (self.output_rows == "input" and call.asked.all)):
            return None
        if isinstance(output, tuple):
            return call.in_input_rows(output[0]), *output[1:]
        output.last_hidden_state = call.in_input_rows(output.last_hidden_state)
        return output

    def _after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = kwargs.get(CALL)
        if isinstance(call, Prefill) and call.left_open:
            self.last_prefill = call.finish()


def _parameters(module: nn.Module) -> list[str]:
    """Names of forward's parameters, for arguments passed by position."""
    return list(inspect.signature(module.forward).parameters)


def _forget_copied_hooks(module: nn.Module) -> None:
    """Take off idle hooks, which a copy of a model has where a method was at work in the model."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(getattr(hook, "func", hook), "__self__", None)
            if isinstance(owner, StaysBehind) and owner.idle:
                del hooks[key]
