"""A step's rows on their way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.backends import Backends
from vtp_kernels.ops import compact_rows

from .attention import ShallowAttention, Shared, StageAttention
from .choice import Choice, Heads, Rows, Seen
from .ground import (
    AllRanks,
    check_layers,
    get_forward_context,
    override_forward_context,
    with_metadata,
    with_rows,
)
from .settings import Settings

__all__ = ["Passage"]


class Passage:
    """The layers of a language model, one by one, for steps in which rows leave. All other steps
    are vLLM's own, compiled and in graphs."""

    def __init__(self, decoder: nn.Module, settings: Settings) -> None:
        check_layers(decoder)
        self.settings, self.decoder = settings, decoder
        self.shared = Shared()
        self.backends = Backends(None)
        self.observed = set(settings.method.observed_layers(len(decoder.layers)))
        for number, layer in enumerate(decoder.layers):
            stage = settings.stage_of(number)
            if stage is not None:
                StageAttention.make(layer.self_attn.attn, stage, self.shared)
            elif settings.packed:
                ShallowAttention.make(layer.self_attn.attn, settings.times)

    def is_asked_for(self) -> bool:
        """Whether prompts are read in this forward pass that vLLM would read otherwise. One without
        metadata is no step at all: vLLM measures its memory so."""
        step = self.shared.step
        real = isinstance(get_forward_context().attn_metadata, dict)
        return real and step is not None and len(step.fresh) > 0

    def __call__(
        self, positions: Tensor, embeddings: Tensor, planes: Sequence[Tensor] = ()
    ) -> Tensor:
        """What the last layer puts out, [rows, C]; 0 for rows that left. positions: [rows], or
        [3, rows] with M-RoPE. planes: what is added to the rows after each of the first layers."""
        step, context, device = self.shared.step, get_forward_context(), positions.device
        choice = Choice(self.settings, step, self.backends)
        hidden, residual = embeddings[: step.rows], None
        turns = positions.movedim(-1, 0)[: step.rows]  # where each is turned to
        left = torch.arange(step.rows, device=device)  # which rows these are
        places, visual, seen = step.places, step.visual, None
        for first, last, stage in self._stretches():
            if stage is not None and self._decides(stage):
                read = hidden if residual is None else hidden + residual
                stays = choice.stays(stage, Rows(read, visual, places), seen)
                if stays is not None:
                    hidden, residual, turns, places, visual, left = _compacted(
                        stays, hidden, residual, turns, places, visual, left
                    )
                if not self.settings.counted:
                    context = with_metadata(context, self.shared.again(stage))
            with override_forward_context(with_rows(context, len(hidden))):
                for number in range(first, last):
                    layer = self.decoder.layers[number]
                    with (
                        _watching(layer.self_attn, number in self.observed) as calls,
                        self._passive(number, choice, stage, visual),
                    ):
                        turned = turns.movedim(0, -1).contiguous()
                        hidden, residual = layer(turned, hidden, residual)
                    if number < len(planes):
                        hidden = hidden + planes[number][left]
                    seen = _seen(layer.self_attn, calls)
        hidden, _ = self.decoder.norm(hidden, residual)
        return hidden.new_zeros(len(embeddings), hidden.shape[1]).index_copy_(0, left, hidden)

    def _decides(self, stage: int) -> bool:
        """Whether the method is to be asked: where rows are not counted, whatever it leaves."""
        return not self.settings.counted or self.shared.step.loses_at(stage)

    @contextmanager
    def _passive(self, number: int, choice: Choice, stage: int | None, visual: Tensor) -> Any:
        """In a layer where visual tokens are passive its attention runs as ever, which fills the
        cache, and what it puts out is replaced."""
        how, attention = self.settings.passive.get(number), self.decoder.layers[number].self_attn
        if how is None:
            yield
            return
        hook = attention.attn.register_forward_hook(
            lambda module, args, output: choice.passive(
                stage, how, visual, _seen(attention, {"attended": args[:3]}), output
            )
        )
        try:
            yield
        finally:
            hook.remove()

    def _stretches(self) -> list[tuple[int, int, int | None]]:
        """The layers before the first stage, and those of each: (first, behind the last, stage)."""
        bounds = [0, *self.settings.layers, len(self.decoder.layers)]
        stages = [None, *range(len(self.settings.layers))]
        return list(zip(bounds[:-1], bounds[1:], stages, strict=True))


def _compacted(stays: Tensor, *rows: Tensor | None) -> list[Tensor | None]:
    """[rows, ...] each, or None: the rows that stay."""
    given = [x[None] for x in rows if x is not None]
    found = iter(compact_rows(given, stays[None]))
    return [None if x is None else next(found)[0] for x in rows]


@contextmanager
def _watching(attention: nn.Module, watched: bool) -> Any:
    """What a layer's rotary embedding and attention are called with, if it is watched."""
    calls: dict[str, Any] = {}
    if not watched:
        yield calls
        return

    def unrotated(module: nn.Module, args: Any) -> None:
        calls["unrotated"] = tuple(x.clone() for x in args[1:])  # they are turned in place

    def attended(module: nn.Module, args: Any) -> None:
        calls["attended"] = args[:3]

    hooks = [
        attention.rotary_emb.register_forward_pre_hook(unrotated),
        attention.attn.register_forward_pre_hook(attended),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _seen(attention: nn.Module, calls: dict[str, Any]) -> Seen | None:
    if not calls:
        return None
    heads = Heads(
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        attention.scaling,
        AllRanks(attention.total_num_heads),
    )
    return Seen(heads, *calls["attended"], calls.get("unrotated"))
