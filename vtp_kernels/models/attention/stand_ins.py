"""Attention modules that stand in for a layer's own, share its weights and keep its names.

A stand-in has the very children of the module it replaces, so a model's state_dict keeps its keys,
gradients, devices and dtypes are those of the one set of weights, and a child that is swapped in
one (for an adapter, say) is swapped in both. It may be used alone:

    layer.self_attn = ScoringAttention(layer.self_attn)
    output, scores = layer.self_attn(hidden, position_embeddings=..., candidates=is_visual)

The engine leaves a layer's own attention in its place. It puts an `AttentionShadow` in front of its
forward, and keeps stand-ins beside the model, for what they do where more is asked.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.ops import attention_scores, compact_rows, passive_attention
from vtp_kernels.selection import Selection

from ..keys.reach import PASSIVE, refuse_window
from ..modules.shadow import Shadow
from .observation import Observation
from .packing import Packing
from .projections import attend, project_all, put_out, refuse_sinks, rotate, takes_positions

__all__ = [
    "CALL",
    "AttentionShadow",
    "PackedAttention",
    "PassiveVisualAttention",
    "ScoringAttention",
    "SomeRowsAttention",
    "StandIn",
]

CALL = "vtp_call"
"""The keyword argument in which a call travels through the model."""


class StandIn(nn.Module, ABC):
    """Has the children and settings of the module it stands in for, `replaced`, and lets it run
    unless more is asked.

    forward() takes the arguments of `replaced`, and besides, by name, those of OPTIONS: these are
    for `attend`, and where the first of them is None, `replaced` itself runs.
    """

    OPTIONS: ClassVar[tuple[str, ...]]

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, value in vars(attention).items():  # as `layer_idx`
            if not name.startswith("_") and not callable(value):
                setattr(self, name, value)
        for name in ("_modules", "_parameters", "_buffers"):
            self.__dict__[name] = vars(attention)[name]  # what is put into one is in both
        self.__dict__["replaced"] = attention  # not as a child: its children are here already

    def train(self, mode: bool = True) -> StandIn:
        super().train(mode)
        self.replaced.training = mode
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        given = {
            "hidden_states": hidden_states,
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        options = {name: kwargs.pop(name) for name in self.OPTIONS if name in kwargs}
        if options.get(self.OPTIONS[0]) is None:
            return self.replaced(**given, **kwargs)
        return self.attend(self.replaced, **given, **options, **kwargs)

    @abstractmethod
    def attend(self, plain: Callable[..., Any], **given: Any) -> tuple[Tensor, Tensor | None]:
        """What the stand-in does where more is asked, given all arguments by name. `plain` is the
        replaced module, or its forward."""


class AttentionShadow(Shadow):
    """In front of the forward of a layer's attention: asks the call that is under way, if any, what
    is to happen in its place."""

    def __init__(self, attention: nn.Module, layer: int, stand_in: StandIn | None) -> None:
        super().__init__(attention, "forward")
        self.layer, self.stand_in = layer, stand_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            return self.original(*args, **kwargs)
        if args:
            kwargs |= inspect.signature(self.original).bind_partial(*args).arguments
        options = call.attending(self.layer, self.module, kwargs)
        if options is None:
            return self.original(**kwargs)
        return self.stand_in.attend(self.original, **kwargs, **options)


class PassiveVisualAttention(StandIn):
    """Causal attention in which visual tokens are passive, or the replaced module's own.

    Parameters
    ----------
    attention : a Llama-like attention module, which is not changed
    passive : how visual tokens are passive
    backend : of `vtp_kernels.passive_attention`

    forward() takes the arguments of `attention`, and besides

    visual : bool [B, S] or None
        Which rows are visual tokens. None (decoding, say): `attention` itself runs.
    past : int
        Keys in the cache before these rows; they count as text.
    valid : bool [B, past + S] or None
        False for padding. The attention mask is not looked at.
    """

    OPTIONS = ("visual", "past", "valid")

    def __init__(
        self, attention: nn.Module, passive: PassiveVisual, backend: str | None = None
    ) -> None:
        refuse_window(attention, PASSIVE)
        refuse_sinks(attention, "passive visual tokens")
        super().__init__(attention)
        self.passive, self.backend = passive, backend

    def attend(
        self,
        plain: Callable[..., Any],
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        visual: Tensor,
        past: int = 0,
        valid: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        attention = self.replaced
        query, key, value, gate = project_all(attention, hidden_states)
        query, key = rotate(attention, query, key, *position_embeddings, position_ids)
        keys = past + key.shape[2]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
            key, value = key[:, :, :keys], value[:, :, :keys]  # a static cache has more room
        # Every key needs its query: those that came before are computed along.
        query, visual = pad(query, (0, 0, past, 0)), pad(visual, (past, 0))
        output = attend_passively(
            self.passive, query, key, value, visual, valid, attention.scaling, self.backend
        )[:, :, past:]
        output = output.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return put_out(attention, output, gate), None


def attend_passively(
    passive: PassiveVisual,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visual: Tensor,
    valid: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """[B, Hq, S, D]: `vtp_kernels.passive_attention` as a method asks for it."""
    options = {
        "valid": valid,
        "sink": passive.sink,
        "renormalize": passive.renormalize,
        "scale": scale,
        "backend": backend,
    }
    output = passive_attention(
        query, key, value, visual=visual, visual_rows=passive.visual_rows, **options
    )
    if passive.spare_second_half:
        first_half = visual & (2 * visual.cumsum(1) <= visual.sum(1, keepdim=True))
        text = passive_attention(
            query, key, value, visual=first_half, visual_rows="skip", **options
        )
        output = torch.where(visual[:, None, :, None], output, text)
    return output


class SomeRowsAttention(StandIn):
    """The replaced module's own attention among some of the rows; the others get 0 from it.

    forward() takes the arguments of `attention`, and besides

    rows : Selection or None
        The rows that take part. None (decoding, say): all of them, `attention` itself runs.
    silent : bool [B, S]
        Rows that get 0 although they take part.

    Positions and their embeddings are those of all rows; the attention mask is that of the rows in
    `rows`, which are handed to `attention` with any padding in front. The cache gets their keys
    alone.
    """

    OPTIONS = ("rows", "silent")

    def __init__(self, attention: nn.Module, backend: str | None = None) -> None:
        super().__init__(attention)
        self.backend = backend

    def attend(
        self,
        plain: Callable[..., Any],
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        rows: Selection,
        silent: Tensor,
        **given: Any,
    ) -> tuple[Tensor, None]:
        batch, length, width = hidden_states.shape
        cos, sin = (x.expand(batch, *x.shape[1:]) for x in position_embeddings)
        # Row 0 is one more, which takes what nobody is to get.
        places = torch.arange(1, length + 1, device=hidden_states.device).expand(batch, -1)
        places = places.masked_fill(silent, 0)
        of_each = [hidden_states, cos, sin, places]
        if takes_positions(self.replaced):
            of_each.append(given["position_ids"].expand(batch, -1))
        some, cos, sin, places, *positions = compact_rows(
            of_each, *rows, align="right", backend=self.backend
        )
        if positions:
            (given["position_ids"],) = positions
        output, _ = plain(hidden_states=some, position_embeddings=(cos, sin), **given)
        everything = output.new_zeros(batch, length + 1, width)
        everything.scatter_(1, places[..., None].expand(-1, -1, width), output)
        return everything[:, 1:], None


class PackedAttention(StandIn):
    """The replaced module's own attention, of rows that come without the padding between them.

    forward() takes the arguments of `attention`, and besides

    packing : Packing or None
        Where the rows belong. None: `attention` itself runs, on rows as they are.

    Hidden states and the output are [1, N, C]; positions and their embeddings, mask and cache are
    those of the padded batch.
    """

    OPTIONS = ("packing",)

    def attend(
        self,
        plain: Callable[..., Any],
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Any,
        packing: Packing,
        **given: Any,
    ) -> tuple[Tensor, None]:
        attention = self.replaced
        *states, gate = project_all(attention, hidden_states)
        query, key, value = (packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in states)
        query, key = rotate(attention, query, key, *position_embeddings, given.get("position_ids"))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        output = attend(attention, query, key, value, attention_mask, **given)
        return put_out(attention, packing.pack(output), gate), None


class ScoringAttention(StandIn):
    """The replaced module's own attention, by whatever implementation, and the attention that some
    rows pay to candidate keys. No attention matrix is made.

    Parameters
    ----------
    attention : a Llama-like attention module, which is not changed
    backend : of `vtp_kernels.attention_scores`

    forward() takes the arguments of `attention`, and besides

    candidates : bool [B, S] or None
        The rows whose scores are wanted. None (decoding, say): `attention` alone runs.
    rows : slice
        The rows that score; by default the last one.
    past : int
        Keys in the cache before these rows; they are attended to, and no candidates.
    valid : bool [B, past + S] or None
        False for padding, which must be said here as well as in the attention mask.

    It returns (output, scores): scores float32 [B, S] in the place of attention weights, mean over
    rows and heads of a softmax over all that a row sees, 0 off the candidates.
    """

    OPTIONS = ("candidates", "rows", "past", "valid")

    def __init__(self, attention: nn.Module, backend: str | None = None) -> None:
        refuse_window(attention, "ScoringAttention knows no windows")
        refuse_sinks(attention, "ScoringAttention")
        super().__init__(attention)
        self.backend = backend

    def attend(
        self,
        plain: Callable[..., Any],
        candidates: Tensor,
        rows: slice = slice(-1, None),
        past: int = 0,
        valid: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, Tensor]:
        output, _ = plain(**given)
        seen = Observation(self.replaced, given)
        first, last, _ = rows.indices(candidates.shape[1])
        positions = torch.arange(past + first, past + last, device=candidates.device)
        query = seen.queries(rows)
        scores = attention_scores(
            query,
            seen.keys(past),
            candidates=pad(candidates, (past, 0)),
            valid=valid,
            query_positions=positions.expand(len(candidates), -1),
            scale=seen.scale,
            backend=self.backend,
        )
        return output, seen.heads(query).mean(scores, query)[:, past:]
