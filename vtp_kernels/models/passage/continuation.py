"""A forward pass on a pruned cache that brings no images: decoding, or a further turn of text.

Nothing leaves here. Layers only need masks, and closed-up positions, that fit the keys they hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention.projections import takes_positions
from ..families import ModelParts
from ..keys.cache import KeyRows, PrunedCache, is_static, let_go
from ..keys.masks import causal_mask, columns_of, mask_of, tells_by_mask, without_padding
from ..keys.reach import LayerKind, reach_of
from .limits import check_padding, check_windows

__all__ = ["Continuation"]


class Continuation:
    """The state of one such pass. Masks are made once per stage and kind of layer, at the first of
    these."""

    def __init__(self, parts: ModelParts, cache: PrunedCache, arguments: dict[str, Any]) -> None:
        self.parts = parts
        self.cache = cache
        self.static = is_static(cache)
        self.takes_positions = takes_positions(parts.layers[parts.counted].self_attn)
        embeddings = arguments.get("inputs_embeds")
        rows = (embeddings if embeddings is not None else arguments["input_ids"]).shape[1]
        past = None if self.static else int(cache.get_seq_length())
        self.mask = columns_of(mask_of(arguments), rows, past)
        check_padding(cache.vtp.padding, self.mask)
        if past is not None:
            check_windows(parts, past + rows)
        # Of pictures that were merged into embeddings already, where there are any.
        self.blocks = parts.blocks(arguments)
        # By kind of layer: the keys of the last one, and its inputs.
        self.made: dict[LayerKind, tuple[KeyRows, dict[str, Any]]] = {}

    def enter(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        keys = self.cache.vtp.layers[layer]
        if keys is not None:
            # Not by id(): compiled code would be good for this one cache, and made anew for the
            # next prompt.
            kind = self.parts.kinds[layer]
            if kind not in self.made or self.made[kind][0] is not keys:
                self.made[kind] = keys, self._inputs_of(keys, layer, hidden, arguments)
            arguments.update(self.made[kind][1])
        return hidden

    def _inputs_of(
        self, keys: KeyRows, layer: int, hidden: Tensor, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        config = self.parts.text.config
        mask = self.mask
        if without_padding(config, mask, arguments["attention_mask"]):
            mask = None
        held, kind, rows = self.cache.layers[layer], self.parts.kinds[layer], hidden.shape[1]
        # A tensor where the cache is static: not read here.
        past = held.cumulative_length if self.static else held.get_seq_length()
        length = held.max_cache_len if self.static else past + rows
        gone = let_go(self.cache, layer, rows)
        valid = keys.valid_keys(length, mask)
        inputs = {
            "attention_mask": causal_mask(
                config,
                hidden,
                past=past - gone if gone else past,
                key_length=length - gone,
                valid=valid[:, gone:] if gone and valid is not None else valid,
                static=self.static,
                sees=self._sees(kind, keys, past, rows, slice(gone, length)),
            ),
        }
        positions, shift = arguments["position_ids"], keys.shift(mask)
        if shift is not None:
            positions = positions - shift
            inputs["position_embeddings"] = self.parts.rotary(kind, hidden, positions)
        inputs["position_ids"] = positions if self.takes_positions else None
        return inputs

    def _sees(self, kind: LayerKind, keys: KeyRows, past: Any, rows: int, there: slice) -> Any:
        """What the new rows see of those that are there, as a mask function; None: all before
        them. In a static cache a window holds all that will ever come."""
        if kind.window is None and self.blocks is None:
            return None
        if self.static or not tells_by_mask(self.parts.text.config):
            return None
        columns = keys.columns_of(past + rows)
        end = past + rows + keys.offset
        reach = reach_of(kind, columns[:, past:], end, self.blocks)
        return None if reach is None else reach.over(columns[:, there])
