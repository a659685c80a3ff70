"""Whether a text model does what the engine relies on, tried on its own code before a method is at
work in it.

The engine lets rows leave between decoder layers. So a text model must hand nothing but its rows
from layer to layer, with one causal mask and one pair of rotary embeddings for all, which each
layer hands on to its attention; and that must take the steps that attention_check.py knows.

The forwards of the text model, of each layer and of each attention run on a few rows for that.
Weights play no part in it, so copies run that have none of the model's (weightless.py), on the CPU
and in float32, where another computation is told from rounding. No weight is read, loaded or
gathered, no hook is called, and no rank or device is waited for.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.projections import has_these_steps
from ..attention.ranks import all_heads
from ..attention.stand_ins import CALL
from ..families import WHICH_ARE
from ..keys.reach import LayerKind, layer_kinds
from ..modules.linear import linear_layers
from ..modules.unwrapping import own
from .attention_check import HANDED_ON, AttentionCheck, Differs, NotingCache, demand, with_attention
from .weightless import Copies, InPlaceOf

__all__ = ["check_text_model"]

ROWS, START = 5, 3  # and the position of the first
# What a decoder stack calls the norm behind its layers, and a layer that before its attention.
NORMS = ("norm", "embedding_norm")
ENTRY_NORMS = ("input_layernorm", "operator_norm")

# What a text model was like when nothing was found wrong with it.
_passed: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class _Reached(Exception):
    """A layer's attention has been looked at, and the layer need not go on."""


def check_text_model(
    text: nn.Module, row_arguments: Collection[str] = (), may_be_acausal: bool = False
) -> None:
    """Raise NotImplementedError for a decoder stack that the engine cannot read, with what differs
    from what it relies on. `row_arguments` are names of arguments of its layers that tell something
    of each row; with `may_be_acausal` the masks it gets say everything about what rows see. Takes a
    millisecond or two for each layer, once."""
    text = own(text)
    looks = _looks(text)
    if _passed.get(text) != looks:
        _try(text, row_arguments, may_be_acausal)
        _passed[text] = looks
    linear = linear_layers(text)
    for index, layer in enumerate(text.layers):
        if index in linear:
            continue
        attention = own(own(layer).self_attn)
        if has_these_steps(attention):
            all_heads(attention)


def _try(text: nn.Module, row_arguments: Collection[str], may_be_acausal: bool) -> None:
    refused = f"a {text.config.model_type!r} text model is not supported"
    trial = _Trial(text, row_arguments, may_be_acausal)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            trial.run()
    except Differs as found:
        raise NotImplementedError(f"{refused}: {found}.\n{WHICH_ARE}") from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotImplementedError(
            f"{refused}: on a few rows {trial.running} fails with {what}.\n{WHICH_ARE}"
        ) from error


class _Trial:
    """One run of a text model, in which a layer goes as far as its attention."""

    def __init__(
        self, text: nn.Module, row_arguments: Collection[str], may_be_acausal: bool
    ) -> None:
        self.text, self.layers = text, [own(layer) for layer in getattr(text, "layers", ())]
        self.linear = linear_layers(text)
        self.first = min(set(range(len(self.layers))) - self.linear, default=0)
        self.kinds = layer_kinds(text)
        self.known = HANDED_ON.union(row_arguments)
        self.copies, self.cache = Copies(), NotingCache()
        self.positions = torch.arange(START, START + ROWS, device="cpu")[None]
        self.attention = AttentionCheck(self.copies, self.cache, self.positions, may_be_acausal)
        self.running = "it"
        self.reached: list[int] = []  # layers
        self.rows: Tensor | None = None  # what layers are given, and their rotary embeddings
        self.embeddings: dict[str | None, tuple[Tensor, Tensor]] = {}  # by LayerKind.rotary

    def run(self) -> None:
        text = self.text
        for name in ("layers", "rotary_emb"):
            demand(hasattr(text, name), f"it has no {name}")
        norm = next((name for name in NORMS if hasattr(text, name)), None)
        demand(norm, f"it has no {' or '.join(NORMS)}")
        positional = inspect.signature(type(own(text.rotary_emb)).forward).parameters.values()
        more = [x.name for x in positional if x.default is x.empty][3:]  # itself, rows, positions
        if any(kind.rotary is not None for kind in self.kinds):
            more = [name for name in more if name != "layer_type"]
        demand(not more, f"its rotary_emb asks for {', '.join(more)} besides positions")
        for index, layer in enumerate(self.layers):
            has_attention = index in self.linear or hasattr(layer, "self_attn")
            demand(has_attention, f"layer {index} has no attention, self_attn")
        trial = self.copies.of(text, ("rotary_emb",))
        trial.config = with_attention(text.config, "eager")
        self.rotary = trial.rotary_emb
        layers = [InPlaceOf(layer, self._layer(i, layer)) for i, layer in enumerate(self.layers)]
        trial._modules |= {"layers": nn.ModuleList(layers), norm: nn.Identity()}
        width, random = text.config.hidden_size, self.copies.random
        type(text).forward(
            trial,
            inputs_embeds=torch.randn(1, ROWS, width, generator=random, device="cpu"),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        every = list(range(len(self.layers)))
        demand(self.reached == every, f"it runs layers {self.reached} and not {every}")

    def _layer(self, index: int, layer: nn.Module) -> Callable[..., Tensor]:
        """What runs in its place."""

        def run(*args: Any, **arguments: Any) -> Tensor:
            self.running = f"layer {index}"
            demand(len(args) < 2, f"layer {index} is given more than its rows by position")
            given = arguments | dict(zip(("hidden_states",), args, strict=False))
            self._check_given(index, layer, given)
            if index in self.linear:  # it is run on the rows that are left, whatever it does
                self.reached.append(index)
                return given["hidden_states"]
            norm = next((name for name in ENTRY_NORMS if hasattr(layer, name)), None)
            trial = self.copies.of(layer, (norm,))
            attention = own(layer.self_attn)
            looked_at = self._attention(index, attention, trial, norm, given)
            trial._modules["self_attn"] = InPlaceOf(attention, looked_at)
            try:
                type(layer).forward(trial, *args, **arguments, **{CALL: self})
            except _Reached:
                self.reached.append(index)
            return given["hidden_states"]

        return run

    def _check_given(self, index: int, layer: nn.Module, given: dict[str, Any]) -> None:
        here = f"layer {index}"
        parameters = inspect.signature(type(layer).forward).parameters.values()
        takes = {x.name for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)}
        takes.discard("self")
        takes |= {name for name, x in given.items() if isinstance(x, Tensor)}
        more = sorted(takes - self.known)
        demand(not more, f"{here} takes {', '.join(more)} besides its rows")
        rows, embeddings = given["hidden_states"], given.get("position_embeddings")
        pair = isinstance(embeddings, tuple) and len(embeddings) == 2
        pair = pair and all(x.dim() == 3 and x.shape[:2] == (1, ROWS) for x in embeddings)
        demand(pair, f"{here} is given no pair of rotary embeddings [B, S, D], position_embeddings")
        demand(given.get("past_key_values") is self.cache, f"{here} is not given the KV cache")
        kind = self.kinds[index]
        mask, window = given.get("attention_mask"), kind.window
        if index in self.linear:
            demand(mask is None, f"{here} is given a mask where nothing is padding")
        else:
            what = "causal" if window is None else f"causal within a window of {window}"
            demand(_is_causal(mask, window), f"the mask of {here} is not {what}")
        if self.rows is None:
            self.rows = rows
        demand(torch.equal(rows, self.rows), f"something happens to rows before {here}")
        if kind.rotary not in self.embeddings:
            self.embeddings[kind.rotary] = embeddings
            self._check_rotary(kind)
        same = all(map(torch.equal, embeddings, self.embeddings[kind.rotary]))
        demand(same, f"{here} is given other rotary embeddings than layers of its kind before")

    def _check_rotary(self, kind: LayerKind) -> None:
        """Whether they can be made for other positions, where rows close up."""
        if "mrope_section" in (getattr(self.text.config, "rope_parameters", None) or {}):
            return  # positions in rows and columns do not close up
        named = () if kind.rotary is None else (kind.rotary,)
        made = self.rotary(self.rows, self.positions, *named)
        same = all(map(torch.equal, made, self.embeddings[kind.rotary]))
        demand(same, "its rotary embeddings are not what its rotary_emb makes of the positions")

    def _attention(
        self,
        index: int,
        attention: nn.Module,
        layer: nn.Module,
        norm: str | None,
        given: dict[str, Any],
    ) -> Callable[..., Any]:
        """What runs in its place, behind that norm of `layer`, to which `given` was given."""

        def run(*args: Any, **handed: Any) -> Any:
            bound = inspect.signature(type(attention).forward).bind_partial(None, *args)
            handed |= dict(list(bound.arguments.items())[1:])
            demand(
                handed.pop(CALL, None) is self,
                f"layer {index} does not hand on to its attention what it is given besides",
            )
            for name in ("attention_mask", "position_embeddings", "past_key_values"):
                demand(
                    handed.get(name) is given[name],
                    f"layer {index} does not hand its {name} to its attention",
                )
            rows = given["hidden_states"]
            demand(
                norm is None or torch.equal(handed["hidden_states"], getattr(layer, norm)(rows)),
                f"layer {index} attends to something else than rows behind its {norm}",
            )
            # What somebody put in the place of an attention is left alone.
            if index == self.first or has_these_steps(attention):
                self.attention.run(index, attention, handed)
            raise _Reached

        return run


def _looks(text: nn.Module) -> Any:
    """What tells whether a text model is as it was: its code, and settings that are no tensors."""
    layers = [own(layer) for layer in getattr(text, "layers", ())]
    attentions = [own(layer.self_attn) for layer in layers if hasattr(layer, "self_attn")]
    return [_plain(vars(text.config)), *map(_looks_of, (text, *layers, *attentions))]


def _looks_of(module: nn.Module) -> Any:
    kinds = {name: type(child) for name, child in module._modules.items()}
    return type(module), type(module).forward, kinds, _plain(vars(module))


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in attributes.items() if isinstance(x, bool | int | float | str)}


def _is_causal(mask: Any, window: int | None) -> bool:
    """Whether a mask of the eager attention, [1, 1, S, S], is, within a window if there is one."""
    if not isinstance(mask, Tensor):
        return False
    open_to = mask if mask.dtype == torch.bool else mask == 0
    expected = torch.ones_like(open_to).tril()
    if window is not None:
        expected = expected.triu(1 - window)
    return torch.equal(open_to, expected) and mask.shape[-1] == ROWS
