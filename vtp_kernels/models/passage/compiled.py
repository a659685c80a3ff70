"""The decoder stack as one graph, for prompts of a few lengths.

A prompt is padded on its left to the next of these lengths where the decoder stack begins, runs
through code that was compiled for it, and the padding is taken off again where the stack ends: of
the rows that come out, of the KV cache, of all that is remembered of the call. What runs before and
behind, and every call that does not fit, is as it is without.

Compiled code fills a cache of its own, which is then put into the call's. So one graph serves all
kinds of caches, and what a CUDA graph puts out may be overwritten by the next prompt.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import DynamicCache

from vtp_kernels.contract.method import Method

from ..attention.stand_ins import CALL
from ..families import ModelParts
from ..modules.shadow import NamingShadow
from .asked import takes_logits_to_keep
from .prefill import Prefill

__all__ = ["CompiledText", "check_compiled", "forget_compiled_code"]

# What the decoder stack is given of each row, and what else that is the same for all prompts.
OF_ROWS = ("inputs_embeds", "attention_mask", "position_ids")
OTHERS = (CALL, "past_key_values", "use_cache", "cache_position")
# Kinds of attention that take a mask of padding without looking into it.
ATTENTIONS = ("sdpa", "eager")
# The first run compiles, the second records a CUDA graph, the third replays it.
WARM = 3


@dataclass
class Forgotten:
    """How many times all compiled code was thrown away."""

    times: int = 0


forgotten = Forgotten()


def forget_compiled_code() -> None:
    """Compiled code does not notice hooks that come or go: Dynamo leaves them out of its guards."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
        forgotten.times += 1


class Variant(NamedTuple):
    """What code is compiled for. The numbers of visual tokens decide how many rows leave."""

    batch: int
    length: int
    visual: tuple[int, ...]
    cached: bool
    inference_mode: bool


@dataclass
class Held:
    """How often a variant has run, and by how much the GPU's memory grew until it was warm."""

    runs: int = 0
    bytes: int = 0


def check_compiled(parts: ModelParts, method: Method) -> None:
    """Raise NotImplementedError for what cannot run between its embeddings and its logits without
    the host."""
    name, config = type(method).__name__, parts.text.config
    if (why := method.decides_by_data(len(parts.layers))) is not None:
        raise NotImplementedError(
            f"{name} cannot be compiled: how many rows stay has to be known before the layers run, "
            f"and {why}"
        )
    kind = config._attn_implementation
    if kind not in ATTENTIONS:
        raise NotImplementedError(
            f"the attention implementation {kind!r} cannot be compiled: it looks at what is "
            f"padding; use one of {ATTENTIONS}"
        )
    if parts.linear or any(x.window is not None for x in parts.kinds):
        raise NotImplementedError(
            f"{parts.family} cannot be compiled here: some of its layers have sliding windows or "
            "linear attention, whose caches do not take padding and give it back"
        )


class CompiledText(NamingShadow):
    """In front of the forward of the decoder stack.

    lengths : rows that prompts are padded to, in ascending order
    most : as many variants are compiled; calls that want another run as they are
    options : of torch.compile
    """

    def __init__(
        self, parts: ModelParts, lengths: tuple[int, ...], most: int, options: dict[str, Any]
    ) -> None:
        super().__init__(parts.text, "forward")
        self.parts, self.lengths, self.most, self.options = parts, lengths, most, options
        self.variants: dict[Variant, Held] = {}
        self.made_in = forgotten.times
        self.at_least = 0  # rows, while code is made ahead
        self._compiled = torch.compile(self.original, fullgraph=True, dynamic=False, **options)
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get(CALL)
        if not isinstance(call, Prefill) or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        given = {name: x for name, x in self.by_name(args, kwargs).items() if x is not None}
        if self.made_in != forgotten.times:  # all code is gone, whose memory was counted
            self.variants.clear()
            self.made_in = forgotten.times
        variant = self._variant(call, given)
        why = self._why_not(call, given, variant)
        if why is not None:
            call.compiled = {"why_not": why}
            return self.original(*args, **kwargs)
        return self._run(call, given, variant)

    def ahead(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Make code for such inputs of `model`, at every length that they fit."""
        rows = inputs["input_ids"].shape[1]
        fitting = [length for length in self.lengths if length >= rows]
        if not fitting:
            raise ValueError(
                f"inputs: prompts have {rows} rows, and the longest of lengths is "
                f"{self.lengths[-1]}"
            )
        runs = [length for length in fitting for _ in range(WARM)]
        try:
            for length in tqdm(runs, desc="compiling", unit="run", disable=None):
                self.at_least = length
                with torch.no_grad():
                    model(**inputs, **self._last_logits(model))
        finally:
            self.at_least = 0
        if not self.variants:
            raise ValueError("inputs: they do not run compiled: there are no images among them")

    @staticmethod
    def _last_logits(model: nn.Module) -> dict[str, int]:
        return {"logits_to_keep": 1} if takes_logits_to_keep(type(model)) else {}

    # ---- whether ------------------------------------------------------------------------------

    def _variant(self, call: Prefill, given: Mapping[str, Any]) -> Variant:
        """`length` is 0 where the prompt is longer than all of them."""
        batch, rows = call.prompt_visual.shape
        least = max(rows, self.at_least)
        use = given.get("use_cache", self.parts.text.config.use_cache)
        return Variant(
            batch,
            next((length for length in self.lengths if length >= least), 0),
            tuple(call.visual_at_start),
            given.get("past_key_values") is not None or bool(use),
            torch.is_inference_mode_enabled(),
        )

    def _why_not(self, call: Prefill, given: Mapping[str, Any], variant: Variant) -> str | None:
        """What of a call compiled code is not made for; None: it can run it."""
        if not variant.length:
            rows, longest = call.prompt_visual.shape[1], self.lengths[-1]
            return self._warn(
                f"its prompt has {rows} rows, and the longest of lengths is {longest}"
            )
        if torch.is_grad_enabled():
            return "it is not under torch.no_grad() or torch.inference_mode()"
        if call.past:
            return "it goes on from a cache that holds rows"
        if call.asked.by_index:
            return "logits_to_keep is a tensor"
        if call.planes is not None or call.blocks is not None:
            return "its rows see others behind them, or are given features between layers"
        if any(call.placed.get("video", ())):
            return "it brings videos"
        named = [
            name for name in given if name not in (*OF_ROWS, *OTHERS) and given[name] is not False
        ]
        if (
            named
            or given.get("return_dict") is False
            or self.parts.text.config.output_hidden_states
        ):
            return f"more is asked of its decoder stack: {', '.join(named) or 'other outputs'}"
        if variant not in self.variants and len(self.variants) >= self.most:
            return self._warn(
                f"code was made for {self.most} pairs of a length and numbers of visual tokens, "
                "and this would be one more (most=)"
            )
        return None

    def _warn(self, why: str) -> str:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a call runs uncompiled: {why}. report().compiled tells of every call; this is "
                "said once",
                stacklevel=2,
            )
        return why

    # ---- how ----------------------------------------------------------------------------------

    def _run(self, call: Prefill, given: dict[str, Any], variant: Variant) -> Any:
        rows, cache = call.prompt_visual.shape[1], given.get("past_key_values")
        padding = variant.length - rows
        if variant.cached and cache is None:
            cache = DynamicCache(config=self.parts.text.config)
        call.check_cache(cache)
        embeddings, positions = given["inputs_embeds"], given.get("position_ids")
        if positions is None:
            positions = torch.arange(rows, device=embeddings.device)[None]
        positions = positions.expand(*positions.shape[:-2], variant.batch, rows)
        before = call.pad(padding)
        arguments = {
            CALL: call,
            "inputs_embeds": pad(embeddings, (0, 0, padding, 0)),
            "attention_mask": call.valid.long(),
            "position_ids": pad(positions, (padding, 0)),
            "past_key_values": DynamicCache() if variant.cached else None,
            "use_cache": variant.cached,
        }
        held = self.variants.setdefault(variant, Held())
        try:
            # Always: code may have to be made anew, as where something global has changed.
            with torch._dynamo.config.patch(
                recompile_limit=2 * self.most + 8, accumulated_recompile_limit=1 << 16
            ):
                output = (
                    self._warm_up(held, arguments)
                    if held.runs < WARM
                    else self._compiled(**arguments)
                )
        except BaseException:
            if not held.runs:
                del self.variants[variant]
            raise
        call.unpad(before, cache)
        call.compiled = {
            "length": variant.length,
            "padding": padding,
            "lengths": list(self.lengths),
            "mode": self.options.get("mode"),
            "variants": len(self.variants),
            "bytes": self.bytes(embeddings.device),
        }
        output.last_hidden_state = output.last_hidden_state[:, padding:].clone()
        output.past_key_values = cache
        return output

    def _warm_up(self, held: Held, arguments: dict[str, Any]) -> Any:
        """One of the first runs, which compile and allocate."""
        device = arguments["inputs_embeds"].device
        before = _reserved(device)
        output = self._compiled(**arguments)
        held.bytes += _reserved(device) - before
        held.runs += 1
        return output

    def bytes(self, device: torch.device) -> int | None:
        """Of the GPU's memory, what all variants took; None on a CPU."""
        if device.type != "cuda":
            return None
        return sum(held.bytes for held in self.variants.values())


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
