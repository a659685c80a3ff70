"""One forward pass that brings images: rows leave between its layers, as the method says.

Made anew for every such call and handed from hook to hook in its keyword arguments, so that calls
in different threads do not meet.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtp_kernels.contract.backends import Backends
from vtp_kernels.contract.counts import Counts, added, on_host
from vtp_kernels.contract.method import Method
from vtp_kernels.contract.rows import Kept, PromptRows
from vtp_kernels.contract.seen import Sight
from vtp_kernels.contract.vision import PromptVision, Seen, Shown
from vtp_kernels.ops import compact_rows, select_topk
from vtp_kernels.ops.compact_rows import run as run_compact_rows
from vtp_kernels.selection import Selection

from ..attention.observation import Observation
from ..attention.packing import Packing
from ..attention.projections import takes_positions
from ..families import ModelParts
from ..families.deepstack import Planes
from ..families.family import any_of
from ..keys.cache import (
    AtWork,
    CacheState,
    KeyRows,
    PrunedCache,
    check_cache,
    is_static,
    layers_letting_go,
    let_go,
    past_length,
    prune_cache,
    put_away,
    why_no_forgetting,
)
from ..keys.masks import (
    causal_mask,
    columns_of,
    mask_of,
    padding_of,
    right_aligned,
    takes_keys_by_mask,
    tells_by_mask,
    valid_keys,
)
from ..keys.positions import close_up, rows_that_left
from ..keys.reach import Blocks, LayerKind, reach_of
from ..modules.placement import key_dtype
from ..pictures.units import Units
from ..pictures.watch import VisionWatch, seen_of
from ..reports.report import PrefillRecord, Ranked, StageRecord
from .asked import rows_asked_for
from .decision import decision
from .forgetting import Text, forget_visual
from .last_layer import asks_few_rows, may_give_few_rows, put_keys
from .limits import check_further_turn, check_padding, check_placement, check_prefill
from .plan import Plan

__all__ = ["Prefill"]


Group = tuple[int, int]
"""Layers whose keys are of the same rows: which KeyRows of the past, and which stage."""

ONE = -1
"""The stage of layers in which one visual token takes part."""


class Applied(Protocol):
    """What is the same in all calls while a method is applied."""

    parts: ModelParts
    method: Method
    positions: str
    plan: Plan
    first_decision: int
    backends: Backends
    backend: str | None
    at_work: AtWork
    watch: VisionWatch | None

    def may_pack(self, index: int) -> bool:
        """Whether layer `index` may run on packed rows."""


class OneVisual(NamedTuple):
    """Text and one visual token of each prompt: the rows; among these, right-aligned, which are no
    padding (bool [B, W], or None) and which are text."""

    selection: Selection
    valid: Tensor | None
    text: Text


class Padded(NamedTuple):
    """How many rows of padding came in front of a call; and of the prompts as they were, which
    rows are visual, and which no padding."""

    rows: int
    visual: Tensor
    valid: Tensor | None


class Prefill:
    """The state of one pruned forward pass. B prompts, S rows at first, fewer from stage to stage.

    Everything that decides a shape is known on the host: one small read when the call begins, at
    the place where transformers itself waits to look at the padding. After that nothing waits, but
    a method whose counts depend on the picture.
    """

    def __init__(self, engine: Applied, arguments: dict[str, Any]) -> None:
        """`arguments` are those of the model's forward, by name."""
        self.parts, self.method, self.positions = engine.parts, engine.method, engine.positions
        self.plan, parts = engine.plan, engine.parts
        self.first_decision = engine.first_decision
        self.backends, self.backend = engine.backends, engine.backend
        self.may_pack, self.at_work = engine.may_pack, engine.at_work
        self.placeholders = parts.placeholders(arguments)
        self.units = Units(parts, arguments, self.placeholders)
        visual = any_of(self.placeholders)
        # Where the tower runs within this call, it adds what it sees.
        self.seen, self.handed_on = {}, {}
        if engine.watch is not None:
            tower = engine.watch.tower
            self.seen = seen_of(arguments, self.placeholders.keys(), tower)
            self.handed_on = tower.handed_on(arguments)
        batch, rows = visual.shape
        cache = arguments.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        check_prefill(parts, arguments, cache, self.past, self.past + rows)
        check_placement(parts, self.method, self.plan.observed)  # offloaded after apply(), perhaps

        self.asked = rows_asked_for(arguments.get("logits_to_keep", 0), rows, visual.device)
        mask = mask_of(arguments)
        columns = columns_of(mask, rows, None if is_static(cache) else self.past)
        valid = padding_of(mask, columns, rows, self.past)
        # Rows whose logits are asked for have to be there in the end, whatever they are.
        visual = visual.clone() if valid is None else visual & valid
        self.asked.leave_out(visual)
        past_state = cache.vtp if isinstance(cache, PrunedCache) else None
        past_valid = None
        if self.past:
            check_padding(None if past_state is None else past_state.padding, columns)
            past_valid = None if columns is None else columns[:, : self.past]
        self.blocks: Blocks | None = parts.blocks(arguments)
        self._read(visual, valid, past_valid)
        check_further_turn(parts, self.past, batch, self.valid is not None)
        if self.plan.needs_units:
            self._tell_units_apart(visual)

        self.visual = self.prompt_visual = visual
        self.prompt_valid = self.valid
        self.origin = torch.arange(rows, device=visual.device).expand(batch, rows)
        # With unused slots in the cache, the model's own masks may let these be read.
        self.uneven = self.plan.uneven or (
            is_static(cache) and takes_keys_by_mask(parts.text.config)
        )
        self.takes_positions = takes_positions(parts.layers[parts.counted].self_attn)
        self.memory: dict[str, Any] = {}  # the method's own
        # The layer that may run on the rows asked for alone.
        self.last = len(parts.layers) - 1 if asks_few_rows(parts, arguments) else -1

        self.vision: PromptVision | None = None  # once the tower has run
        self.planes: Planes | None = None  # where the model leaves it to this call to add them
        self.observation: Observation | None = None
        self.packing: Packing | None = None  # where much padding came with the rows that left
        self.packed: Packing | None = None  # of the layer that runs
        self.compiled: dict[str, Any] | None = None  # what report() is to tell of that
        self.left_open = False  # whether it has yet to `finish`, outside of compiled code
        self.few = False  # whether that runs on the rows asked for alone
        self.entered = -1  # the layer that runs
        self.attended = -1  # the last layer whose attention asked what to do
        # By kind of layer, once rows have left: cosines and sines of those that are there.
        self.embeddings: dict[LayerKind, tuple[Tensor, Tensor]] = {}
        self.row_positions: Tensor | None = None  # only where rows close up
        self.left: Tensor | None = None  # bool [B, columns of the prompt], there too
        self.cache: Any = None
        self.state: CacheState | None = None  # what is remembered of it
        self.past_state = past_state
        self.key_rows: dict[Group, KeyRows] = {}
        self.inputs: dict[tuple[Group, LayerKind], dict[str, Any]] = {}
        self.group: Group = -1, 0  # of the layer that runs
        self.layer_keys: list[KeyRows | None] = []
        self.past_rows: list[tuple[int, Tensor | None]] = []
        self.forgotten: dict[int, Text] = {}  # by layer
        self.stages: list[StageRecord] = []

    def _read(self, visual: Tensor, valid: Tensor | None, past_valid: Tensor | None) -> None:
        """The one read: rows per prompt of each kind, and whether there is padding at all."""
        real = torch.ones_like(visual) if valid is None else valid
        before = real & (visual.cumsum(1) == 0)
        kinds = torch.stack((visual, real, before, *self.placeholders.values())).sum(2)
        counts = [kinds, real[None, :, -1]]
        if past_valid is not None:
            counts.append(past_valid.sum(1)[None])
        if self.blocks is not None:
            counts.append(self.blocks.apart[None])
        self.visual_at_start, self.real_at_start, *more = torch.cat(counts).tolist()
        self.text_before, *placed, ends_real = more[: 2 + len(self.placeholders)]
        self.placed = dict(zip(self.placeholders, placed, strict=True))  # by modality
        past = more[2 + len(self.placeholders) :]
        if self.blocks is not None and any(past.pop()):
            raise NotImplementedError(
                "token_type_ids: rows that see each other must follow upon each other, and in a "
                "prompt of this call others are between them"
            )
        self.valid = None if min(self.real_at_start) == visual.shape[1] else valid
        self.past_mask = past_valid if past and min(past[0]) < self.past else None
        if not all(ends_real):
            raise ValueError(
                "attention_mask: a prompt ends in padding; pruning needs left padding "
                "(processor.tokenizer.padding_side = 'left')"
            )
        pairs = zip(self.real_at_start, self.visual_at_start, strict=True)
        self.text_now: Counts = [total - images for total, images in pairs]
        self.visual_now: Counts = list(self.visual_at_start)
        self.text: Text | None = None
        self.one: OneVisual | None = None

    def _tell_units_apart(self, visual: Tensor) -> None:
        """Here, before anything runs, and right behind the one read, for this reads too."""
        try:
            self.units.counts(visual)
            self.units.numbers(visual.device)
            self.method.check_units(self.units.all)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self.parts.family} cannot run {self.method} on this input, which asks which "
                f"picture or frame a visual token is of: {error}"
            ) from error

    # ---- called by the hooks, layer by layer --------------------------------------------------

    def attending(
        self, layer: int, attention: torch.nn.Module, given: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What a layer's stand-in needs besides the arguments `given` to its attention; None where
        that runs as it is. Notes them, where the decision before the next layer is to see them."""
        self.attended = layer
        if layer in self.plan.observed:
            seen = dict(given)
            if self.packed is not None:
                seen["hidden_states"] = self.packed.unpack(given["hidden_states"])
            self.observation = Observation(attention, seen)
        if layer in self.plan.passive:
            return self.passive_inputs(layer)
        return None if self.packed is None else {"packing": self.packed}

    def enter(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The rows that `layer` runs on; `arguments`, its other inputs, are changed to match."""
        hidden = self.let_rows_leave(layer, hidden, arguments)
        if self.few:
            hidden = self._rows_asked_for(layer, hidden, arguments)
        for name in self.parts.page.row_arguments:
            if self.stages and arguments.get(name) is not None:
                arguments[name] = self._of_rows_left(name, arguments[name])
        return hidden

    def let_rows_leave(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """All of that but what belongs to the layer itself."""
        if layer == 0:
            self._open_cache(arguments.get("past_key_values"))
        self._check_attended()
        self.entered = layer
        if self.planes is not None:
            hidden = self.planes.add(layer, hidden, self.origin, self.valid)
        if self.past or layer in self.plan.changing:
            hidden = self._change(layer, hidden, arguments)
        else:  # as the layer before
            keys = self.layer_keys[-1]
            self.layer_keys.append(keys)
            if keys is not None:
                arguments.update(self._inputs_of(keys, layer, 0, hidden, arguments))
        self.packed = None
        self.few = layer == self.last and self._may_shorten(layer, hidden)
        if self.packing is not None and not self.few and layer not in self.plan.passive:
            if self.may_pack(layer):
                self.packed = self.packing
                return self.packing.pack(hidden)
        return hidden

    def _change(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What `enter` does at layers that may be unlike the one before."""
        if layer in self.plan.decisions:
            if torch.is_grad_enabled() and hidden.requires_grad:
                raise RuntimeError(
                    "pruning is for inference: call the model under torch.no_grad() or "
                    "torch.inference_mode()"
                )
            rows = self._rows(layer, hidden)
            kept = decision(self.method, layer, rows)
            self.observation = None
            if kept is not None:
                ranked = Ranked(self.origin, rows.ranked)
                hidden = self._compact(layer, hidden, arguments, kept)
                self.stages.append(
                    StageRecord(layer, kept.text, kept.visual, self.origin, self.valid, ranked)
                )
        if layer in self.parts.linear:
            self._before_linear(arguments)
            return hidden
        past = past_length(self.cache, layer) if self.past else 0
        if self.past:
            gone, valid = let_go(self.cache, layer, hidden.shape[1]), self._past_valid(layer, past)
            self.past_rows.append((past - gone, None if valid is None else valid[:, gone:]))
        passive = self.plan.passive.get(layer)
        leaves_one = passive is not None and passive.leaves_one
        keys = self._keys_of_one(layer, past) if leaves_one else self._keys_of(layer, past)
        self.layer_keys.append(keys)
        if layer in self.plan.forgetful:
            self.forgotten[layer] = self._rows_of_one().text if leaves_one else self._rows_of_text()
        if keys is not None:
            attending = (
                hidden[:, : self._rows_of_one().text.rows.shape[1]] if leaves_one else hidden
            )
            arguments.update(self._inputs_of(keys, layer, past, attending, arguments))
        return hidden

    def _of_rows_left(self, name: str, told: Tensor) -> Tensor:
        """What a layer is told of each row of the prompt, int [B, S], of the rows that it runs on;
        0 for padding."""
        if told.shape != self.prompt_visual.shape:
            raise ValueError(
                f"{name}: expected {list(self.prompt_visual.shape)}, a number for each row of the "
                f"call, got {list(told.shape)}"
            )
        told = told.gather(1, self.origin)
        if self.valid is not None:
            told = told.masked_fill(~self.valid, 0)
        if self.packed is not None:
            return self.packed.pack(told)
        return told[:, -1 - self.asked.drafts :] if self.few else told

    def _before_linear(self, arguments: dict[str, Any]) -> None:
        """Linear attention holds no keys, and is told which rows are padding."""
        if self.past:
            self.past_rows.append((0, None))
        self.layer_keys.append(None)
        if self.stages:
            arguments["attention_mask"] = self.valid

    def _may_shorten(self, layer: int, hidden: Tensor) -> bool:
        plan, rows = self.plan, hidden.shape[1]
        return (
            rows < self.prompt_visual.shape[1]  # else the logits are the dense model's to the bit
            and rows > 1 + self.asked.drafts
            and layer not in plan.watched
            and layer not in plan.forgetful
            and not (torch.is_grad_enabled() and hidden.requires_grad)
            and may_give_few_rows(self.parts, self.cache)
        )

    def _rows_asked_for(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The rows whose logits are asked for, once the keys of those before are in the cache."""
        earlier = hidden.shape[1] - 1 - self.asked.drafts
        cos, sin = arguments["position_embeddings"]
        past = past_length(self.cache, layer) if self.past else 0
        positions = arguments["position_ids"]
        before = (x if x is None else x[:, :earlier] for x in (hidden, cos, sin, positions))
        put_keys(self.parts.layers[layer], *before, self.cache)
        asked, length = hidden[:, earlier:], past + hidden.shape[1]
        valid = valid_keys(past, self._past_valid(layer, past), self.valid, self.visual)
        gone = let_go(self.cache, layer, asked.shape[1])
        keys, kind = self.layer_keys[layer], self.parts.kinds[layer]
        arguments["attention_mask"] = causal_mask(
            self.parts.text.config,
            asked,
            past=past + earlier - gone,
            key_length=length - gone,
            valid=None if valid is None else valid[:, gone:],
            sees=self._sees(kind, keys, slice(past + earlier, length), slice(gone, length)),
        )
        arguments["position_embeddings"] = cos[:, earlier:], sin[:, earlier:]
        arguments["position_ids"] = None if positions is None else positions[:, earlier:]
        return asked

    def _check_attended(self) -> None:
        """Whether the layer before had the attention that it was to have."""
        layer = self.entered
        if layer in self.plan.watched and self.attended != layer:
            raise RuntimeError(
                f"layer {layer}: the forward of its self_attn was replaced while a method is at "
                f"work, and {type(self.method).__name__} needs what was there; call it from the "
                "new one, or remove() the method first and apply it anew"
            )

    def passive_inputs(self, layer: int) -> dict[str, Any]:
        """What a stand-in with passive visual tokens needs to know besides the layer's inputs."""
        if self.plan.passive[layer].leaves_one:
            return {"rows": self._rows_of_one().selection, "silent": self.visual}
        past, past_valid = self.past_rows[layer] if self.past else (0, None)
        valid = valid_keys(past, past_valid, self.valid, self.visual)
        return {"visual": self.visual, "past": past, "valid": valid}

    def finish(self) -> PrefillRecord:
        """Forgets what is to be forgotten, after the last layer. What report() needs."""
        self._check_attended()
        if self.cache is not None:
            prune_cache(self.cache, self.state)
            self.state.stop_observing()
            self._forget()
            if any(self.layer_keys):
                self._note_padding()
            else:
                self.cache.forget()  # the model's own masks are right in every layer
        return PrefillRecord(
            config=self.parts.text.config,
            method=self.method,
            depth=len(self.parts.layers),
            bytes_per_number=key_dtype(self.cache, self.parts.text).itemsize,
            prompt_visual=self.prompt_visual,
            text=[a - b for a, b in zip(self.real_at_start, self.visual_at_start, strict=True)],
            visual=self.visual_at_start,
            stages=self.stages,
            past_rows=self.past_rows,
            kinds=self.parts.kinds,
            blocks=self.blocks,
            end=self._end,
            letting_go=layers_letting_go(self.cache),
            passive=self.plan.passive,
            linear=self.parts.linear,
            forgotten=frozenset(self.forgotten),
            memory=self.memory,
            units=self.units,
            compiled=self.compiled,
        )

    # ---- padding of a call, for code that is compiled for a few lengths ------------------------

    def pad(self, rows: int) -> Padded:
        """Put so many rows of padding in front of all prompts, before the first layer. What was
        there before, for `unpad`."""
        before = Padded(rows, self.prompt_visual, self.prompt_valid)
        valid, visual = self._real_rows()[1], self.prompt_visual
        self.valid = self.prompt_valid = pad(valid, (rows, 0), value=False)
        self.visual = self.prompt_visual = pad(visual, (rows, 0), value=False)
        width = self.visual.shape[1]
        self.origin = torch.arange(width, device=visual.device).expand(len(visual), width)
        self.last = -1  # compiled code runs the last layer on all rows
        self.units.pad(rows)
        if self.vision is not None:
            self.vision.shows = pad(self.vision.shows, (rows, 0), value=-1)
        return before

    def unpad(self, before: Padded, cache: Any) -> None:
        """Take them off again, behind the last layer, whose keys go to `cache` (or None)."""
        rows, filled, self.cache = before.rows, self.cache, cache
        self.prompt_visual, self.prompt_valid = before.visual, before.valid
        self.units.pad(-rows)
        alone = len(self.prompt_visual) == 1  # a prompt without others has no padding

        def cut(x: Tensor | None) -> Tensor | None:
            """A copy: the next prompt overwrites what a CUDA graph has put out."""
            return None if x is None else x[:, rows:].clone()

        def columns(x: Tensor) -> Tensor:
            return (x[:, rows:] - rows).clamp(min=-1)

        def origins(x: Tensor) -> Tensor:
            return columns(x).clamp(min=0)  # that of padding is any

        def valid(x: Tensor | None) -> Tensor | None:
            return None if alone else cut(x)

        self.visual, self.origin = cut(self.visual), origins(self.origin)
        self.valid = valid(self.valid)
        self.left = cut(self.left)
        for index, stage in enumerate(self.stages):
            by = [(cut(scores), cut(among)) for scores, among in stage.ranked.by]
            ranked = Ranked(origins(stage.ranked.origin), by)
            text = stage.text.clone() if isinstance(stage.text, Tensor) else stage.text
            self.stages[index] = stage._replace(
                text=text, origin=origins(stage.origin), valid=valid(stage.valid), ranked=ranked
            )
        texts = {id(x): Text(cut(x.rows), on_host(x.counts)) for x in self.forgotten.values()}
        self.forgotten = {layer: texts[id(x)] for layer, x in self.forgotten.items()}
        if cache is None:
            return
        for layer, held in enumerate(filled.layers):
            cache.update(held.keys[:, :, rows:], held.values[:, :, rows:], layer)
        keys = {
            id(x): KeyRows(columns(x.columns), self._end, x.filled and not alone, cut(x.left))
            for x in self.layer_keys
            if x is not None
        }
        self.layer_keys[:] = [None if x is None else keys[id(x)] for x in self.layer_keys]
        self.state.layers = self.layer_keys
        self.state.prompt -= rows

    def in_input_rows(self, hidden: Tensor) -> Tensor:
        """What the model puts out for the rows left, [B, K, C], where they stood in the input:
        [B, S, C]. Rows that left are not a number."""
        batch, rows = self.prompt_visual.shape
        places = self.origin if self.valid is None else torch.where(self.valid, self.origin, rows)
        spread = hidden.new_full((batch, rows + 1, hidden.shape[2]), torch.nan)
        places = places[..., None].expand(-1, -1, hidden.shape[2])
        return spread.scatter(1, places, hidden)[:, :rows]

    # ---- one layer ----------------------------------------------------------------------------

    def _open_cache(self, cache: Any) -> None:
        # A plain call makes its cache inside the text model: this is the first sight of it.
        self.cache = cache
        if cache is None:
            return
        self.check_cache(cache)
        state = CacheState(
            layers=self.layer_keys,  # fills as layers are entered
            removed=0,
            counted=self.parts.counted,
            served=self.at_work,
            prompt=self.past + self.prompt_visual.shape[1] - self.asked.drafts,
            observed=self.plan.observed if put_away(cache) else frozenset(),
        )
        if self.past_state is not None:
            state.removed = self.past_state.removed
            state.prompt -= state.removed
            state.padding = self.past_state.padding
        self.state = state
        if not torch.compiler.is_compiling():  # else when it ends, for compiled code cannot do it
            prune_cache(cache, state)

    def check_cache(self, cache: Any) -> None:
        """Raise NotImplementedError for a cache (or None) that cannot lose what is to leave."""
        if cache is None:
            return
        check_cache(cache, self.parts.kinds)
        reason = why_no_forgetting(cache) if self.plan.forgetful else None
        if reason is not None:
            raise NotImplementedError(
                f"past_key_values: {reason}, so no layer of it can forget visual tokens; use a "
                "DynamicCache that is not offloaded, or a method that keeps them"
            )

    def _note_padding(self) -> None:
        """Columns of padding that layers no longer have, for later calls."""
        state = self.state
        if self.prompt_valid is not None:
            state.padding = self._behind(state.padding, ~self.prompt_valid)

    def _rows_of_text(self) -> Text:
        """The same object for all layers between two decisions."""
        if self.text is None:
            rows = ~self.visual if self.valid is None else self.valid & ~self.visual
            counts = self._text_now()
            self.text = Text(rows, counts if torch.compiler.is_compiling() else on_host(counts))
        return self.text

    def _forget(self) -> None:
        """Take visual rows out of the cache of the layers that forget them."""
        groups: dict[Any, list[int]] = {}
        for layer, text in self.forgotten.items():
            past, _ = self.past_rows[layer] if self.past else (0, None)
            before = self.past_state.layers[layer] if self.past_state else None
            groups.setdefault((past, id(text), id(before)), []).append(layer)
        for layers in groups.values():
            first = layers[0]
            past, _ = self.past_rows[first] if self.past else (0, None)
            held = [self.cache.layers[layer] for layer in layers]
            keys = held[0].keys.shape[2]
            indices, filled = forget_visual(held, self.forgotten[first], past, self.backend)
            width, before = indices.shape[1], self.layer_keys[first]
            columns = before.columns_of(keys).gather(1, indices)
            if filled is not None:
                columns = columns.masked_fill(filled, -1)
            rows = KeyRows(columns, self._end, filled is not None or before.filled, before.left)
            for layer in layers:
                self.layer_keys[layer] = rows
            if first == self.parts.counted:
                self._shorten(keys - width)

    def _rows(self, layer: int, hidden: Tensor) -> PromptRows:
        past, past_valid = self.past_rows[layer - 1] if self.past and layer else (0, None)
        return PromptRows(
            hidden=hidden,
            visual=self.visual,
            valid=self.valid,
            origin=self.origin,
            prompt_visual=self.prompt_visual,
            visual_at_start=self.visual_at_start,
            visual_now=self.visual_now,
            text_now=self._text_now(),
            text_before=self.text_before,
            drafts=self.asked.drafts,
            columns=self.prompt_visual.shape[1],
            depth=len(self.parts.layers),
            memory=self.memory,
            observation=self.observation,
            past=past,
            key_valid=partial(valid_keys, past, past_valid, self.valid, self.visual),
            sight=self._sight(layer - 1, past) if self.observation is not None else None,
            vision=None if layer else self.vision,
            units=self.units,
            backends=self.backends,
        )

    def _text_now(self) -> Counts:
        """Text rows of each prompt. In compiled code their numbers come with the rows, so that it
        is good for prompts of other lengths."""
        if not torch.compiler.is_compiling():
            return self.text_now
        if self.valid is None:
            return [self.visual.shape[1] - visual for visual in self.visual_now]
        return (self.valid & ~self.visual).sum(1)

    def _sight(self, layer: int, past: int) -> Sight | None:
        """What rows saw in the layer that was observed, `past` keys of which came earlier; None if
        that was all before them."""
        kind, keys = self.parts.kinds[layer], self.layer_keys[layer]
        if not self._sees_otherwise(kind):
            return None
        attended = past + self.visual.shape[1]
        if keys is None:  # nothing has left yet
            keys = self._key_rows(None, self.past, self.origin, self.valid)
        gone = past_length(self.cache, layer) - attended if self.past else 0
        columns = keys.columns_of(gone + attended)[:, gone:]
        reach = reach_of(kind, columns[:, past:], self._end, self.blocks)
        return None if reach is None else Sight(columns, reach.first, reach.last)

    def begin(self, arguments: dict[str, Any]) -> None:
        """Behind the tower, before the first layer. `arguments` are those of the decoder stack."""
        self.planes = self.parts.page.take_planes(arguments, self.first_decision)
        if self.plan.sees_pictures:
            self.vision = self._vision()
            self.method.look_ahead(self.vision)

    def _vision(self) -> PromptVision:
        """For layer 0, where all rows are there; later the pictures are no longer asked for."""
        if missing := self.placeholders.keys() - self.seen.keys():
            raise ValueError(
                f"{type(self.method).__name__} needs to know what the vision tower saw, and the "
                f"{' and '.join(sorted(missing))} features of this call were made before it was "
                "applied; encode them anew"
            )
        shown = [
            Shown(self._handed_on(modality), rows, self.placed[modality])
            for modality, rows in self.placeholders.items()
        ]
        return PromptVision(shown, self.backend)

    def _handed_on(self, modality: str) -> Seen:
        """What was seen, with the rows that the text gets of it."""
        seen, rows = self.seen[modality], self.handed_on.get(modality)
        return seen if rows is None else seen._replace(shows=seen.shows[rows])

    def _compact(self, layer: int, hidden: Tensor, arguments: dict[str, Any], kept: Kept) -> Tensor:
        """Carry out a decision: gather what stays, right-aligned so that prompts end together."""
        batch, rows = self.visual.shape
        kind = self.parts.kinds[layer]
        cos, sin = self._embeddings(kind, arguments)
        indices, counts = kept.selection
        hidden = hidden if kept.hidden is None else kept.hidden
        hidden, cos, sin, self.visual, self.origin = run_compact_rows(
            (
                hidden,
                cos.expand(batch, *cos.shape[1:]),
                sin.expand(batch, *sin.shape[1:]),
                self.visual,
                self.origin,
            ),
            indices,
            counts,
            align="right",
            backend=self.backends.of("compact_rows", hidden),
        )
        width, totals = indices.shape[1], added(kept.text, kept.visual)
        self.valid = right_aligned(totals, counts, width)
        if self.asked.by_index:
            name = type(self.method).__name__
            self.asked.check(self.origin, *self._real_rows(), name, layer)
        self.packing = None
        # Compiled code takes rows as they come, for their number is in no shape.
        compiling = torch.compiler.is_compiling()
        if not compiling and totals is not None and sum(totals) < sum(self.real_at_start):
            self.packing = Packing.of(totals, width, hidden.device)
        self.embeddings = {kind: (cos, sin)}
        self.text = self.one = None
        self.text_now, self.visual_now = kept.text, kept.visual
        if self.positions == "contiguous":
            self._close_up(arguments)
        if layer <= self.parts.counted and self.cache is not None:
            self._shorten(rows - width)
        return hidden

    def _real_rows(self) -> tuple[Tensor, Tensor]:
        """Which rows are no padding: of those left, bool [B, K], and of the prompt, bool [B, S]."""
        real = torch.ones_like(self.visual) if self.valid is None else self.valid
        prompt = self.prompt_valid
        return real, torch.ones_like(self.prompt_visual) if prompt is None else prompt

    def _close_up(self, arguments: dict[str, Any]) -> None:
        if self.row_positions is None:
            self.model_positions = arguments["position_ids"].expand(self.prompt_visual.shape)
        real, prompt = self._real_rows()
        self.row_positions = close_up(self.model_positions, self.origin, real, prompt)
        self.left = rows_that_left(self.origin, real, prompt)

    # ---- what a layer gets instead of the model's own mask and positions ----------------------

    def _rows_of_one(self) -> OneVisual:
        """Text and the first visual token of each prompt."""
        if self.one is None:
            text = self._rows_of_text()
            first = self.visual & (self.visual.cumsum(1) == 1)
            there = on_host(self.visual_now)
            one = [min(count, 1) for count in there]
            counts = added(text.counts, one)
            if counts is None:  # in compiled code
                width = first.shape[1] - min(a - b for a, b in zip(there, one, strict=True))
            else:
                width = max(counts)
            selection = select_topk(
                torch.zeros(first.shape, device=first.device),
                0,
                keep=text.rows | first,
                capacity=width,
                backend=self.backend,
            )
            (is_text,) = compact_rows((text.rows,), *selection, align="right", backend=self.backend)
            valid = right_aligned(counts, selection.counts, width)
            self.one = OneVisual(selection, valid, Text(is_text, text.counts))
            if self.cache is not None and len(self.layer_keys) == self.parts.counted:
                self._shorten(first.shape[1] - width)
        return self.one

    def _shorten(self, rows: int) -> None:
        """Note that the layer the model counts by lacks so many rows more."""
        self.state.removed += rows
        self.state.prompt -= rows

    @property
    def _end(self) -> int:
        """The column of the row after this call's."""
        return self.past + self.prompt_visual.shape[1]

    def _keys_of_one(self, layer: int, past: int) -> KeyRows:
        before, number = self._before(layer)
        self.group = number, ONE
        if self.group not in self.key_rows:
            one = self._rows_of_one()
            (origin,) = compact_rows(
                (self.origin,), *one.selection, align="right", backend=self.backend
            )
            self.key_rows[self.group] = self._key_rows(before, past, origin, one.valid)
        return self.key_rows[self.group]

    def _keys_of(self, layer: int, past: int) -> KeyRows | None:
        """The key rows of a layer; None while the model's own mask and positions are right."""
        before, number = self._before(layer)
        if before is None and not self.stages and not self.uneven:
            return None
        self.group = number, len(self.stages)
        if self.group not in self.key_rows:
            self.key_rows[self.group] = self._key_rows(before, past, self.origin, self.valid)
        return self.key_rows[self.group]

    def _before(self, layer: int) -> tuple[KeyRows | None, int]:
        """The rows of a layer's keys that came earlier, where some have left; and the first layer
        that shares them, for compiled code does not know objects by their ids."""
        if self.past_state is None or self.past_state.layers[layer] is None:
            return None, -1
        rows = self.past_state.layers[layer]
        return rows, next(i for i, x in enumerate(self.past_state.layers) if x is rows)

    def _key_rows(
        self, before: KeyRows | None, past: int, origin: Tensor, valid: Tensor | None
    ) -> KeyRows:
        """`past` keys that came earlier, and behind them rows of this call."""
        columns = origin + self.past if self.past else origin
        if valid is not None:
            columns = columns.masked_fill(~valid, -1)
        if past:
            if before is None:
                earlier = torch.arange(past, device=origin.device).expand(len(origin), -1)
            else:
                earlier = before.columns_of(past)
            columns = torch.cat((earlier, columns), dim=1)
        filled = valid is not None or (before is not None and before.filled)
        left = None if before is None else before.left
        if self.left is not None:
            left = self._behind(left, self.left)
        return KeyRows(columns, self._end, filled, left)

    def _behind(self, before: Tensor | None, now: Tensor) -> Tensor:
        """What is said of earlier columns, bool [B, at most past], and of this call's behind it."""
        if before is None:
            before = now.new_zeros(len(now), self.past)
        return torch.cat((pad(before, (0, self.past - before.shape[1])), now), dim=1)

    def _past_valid(self, layer: int, past: int) -> Tensor | None:
        """Which keys that came earlier count under this call's mask: bool [B, past], None: all."""
        if not past:
            return None
        before = self.past_state.layers[layer] if self.past_state else None
        return self.past_mask if before is None else before.valid_keys(past, self.past_mask)

    def _past_shift(self, layer: int) -> Tensor | None:
        before = self.past_state.layers[layer] if self.past_state else None
        return None if before is None else before.shift(self.past_mask)

    def _inputs_of(
        self, keys: KeyRows, layer: int, past: int, hidden: Tensor, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Mask and rotary embeddings, made once for all layers that share `keys`."""
        kind = self.parts.kinds[layer]
        key = self.group, kind
        if key not in self.inputs:
            embeddings = self._embeddings(kind, arguments)
            shift, positions = self._past_shift(layer), None
            closed_up = shift is not None or self.row_positions is not None
            # No position_ids where they can be done without: rows with gaps between them look like
            # packed sequences to transformers, which FlashAttention would then take apart, waiting
            # for the GPU.
            if closed_up or self.takes_positions:
                positions = self._positions(arguments, shift)
            if closed_up:
                embeddings = self.parts.rotary(kind, hidden, positions)
            self.inputs[key] = {
                "attention_mask": self._mask(keys, layer, past, hidden),
                "position_embeddings": embeddings,
                "position_ids": positions if self.takes_positions else None,
            }
        return self.inputs[key]

    def _mask(self, keys: KeyRows, layer: int, past: int, hidden: Tensor) -> Any:
        static, rows = is_static(self.cache), self.visual
        gone, length = let_go(self.cache, layer, hidden.shape[1]), past + hidden.shape[1]
        if static:
            length = self.cache.layers[layer].max_cache_len
            keys.columns_of(length)  # of one size for every step: compiled code is made for it
        now = self.valid
        if self.group[1] == ONE:  # text and one visual token
            now, rows = self._rows_of_one().valid, self._rows_of_one().text.rows
        valid = valid_keys(past, self._past_valid(layer, past), now, rows)
        if valid is not None:
            valid = pad(valid, (0, length - valid.shape[1]), value=True)[:, gone:]
        queries = slice(past, past + hidden.shape[1])
        return causal_mask(
            self.parts.text.config,
            hidden,
            past=past - gone,
            key_length=length - gone,
            valid=valid,
            static=static,
            sees=self._sees(self.parts.kinds[layer], keys, queries, slice(gone, length)),
        )

    def _sees(self, kind: LayerKind, keys: KeyRows, queries: slice, there: slice) -> Any:
        """What some of the rows that `keys` knows see of those that are there, as a mask function;
        None: all before them."""
        if not self._sees_otherwise(kind):
            return None
        columns = keys.columns_of(there.stop)
        reach = reach_of(kind, columns[:, queries], self._end, self.blocks)
        return None if reach is None else reach.over(columns[:, there])

    def _sees_otherwise(self, kind: LayerKind) -> bool:
        """Whether rows may see anything else than all before them in layers of that kind. Where
        masks tell of padding alone, no window is short enough for that: see check_windows."""
        if kind.window is not None and tells_by_mask(self.parts.text.config):
            return True
        return self.blocks is not None

    def _embeddings(self, kind: LayerKind, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rows that are there, in a layer of that kind, which came with
        `arguments`: the model gives those of all rows."""
        if not self.stages:
            return arguments["position_embeddings"]
        if kind not in self.embeddings:
            batch = len(self.origin)
            self.embeddings[kind] = tuple(
                x.expand(batch, -1, -1).gather(1, self.origin[..., None].expand(-1, -1, x.shape[2]))
                for x in arguments["position_embeddings"]
            )
        return self.embeddings[kind]

    def _positions(self, arguments: dict[str, Any], shift: Tensor | None) -> Tensor:
        """Of the rows that are left: int64 [B, K], or [1, K] while all are."""
        positions = self.row_positions
        if positions is None:
            positions = arguments["position_ids"]
            if self.stages:
                positions = positions.expand(self.prompt_visual.shape).gather(1, self.origin)
        return positions if shift is None else positions - shift
