"""A forward pass on a pruned cache that brings no images: decoding, or a further turn of text.

Nothing leaves here. Layers only need masks, and closed-up positions, that fit the keys they hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache import KeyRows, PrunedCache, is_static
from .families import ModelParts
from .limits import check_padding
from .masks import causal_mask, columns_of, mask_of, without_padding
from .projections import takes_positions

__all__ = ["Continuation"]


class Continuation:
    """The state of one such pass. Masks are made once per stage, at its first layer."""

    def __init__(self, parts: ModelParts, cache: PrunedCache, arguments: dict[str, Any]) -> None:
        self.parts = parts
        self.cache = cache
        self.static = is_static(cache)
        self.takes_positions = takes_positions(parts.layers[0].self_attn)
        embeddings = arguments.get("inputs_embeds")
        rows = (embeddings if embeddings is not None else arguments["input_ids"]).shape[1]
        past = None if self.static else int(cache.get_seq_length())
        self.mask = columns_of(mask_of(arguments), rows, past)
        check_padding(cache.vtp.padding, self.mask)
        self.keys: KeyRows | None = None  # those of the layer before, and its inputs
        self.inputs: dict[str, Any] = {}

    def enter(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        keys = self.cache.vtp.layers[layer]
        if keys is not None:
            # Not by id(): compiled code would be good for this one cache, and made anew for the
            # next prompt.
            if keys is not self.keys:
                self.keys, self.inputs = keys, self._inputs_of(keys, layer, hidden, arguments)
            arguments.update(self.inputs)
        return hidden

    def _inputs_of(
        self, keys: KeyRows, layer: int, hidden: Tensor, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        config = self.parts.text.config
        mask = self.mask
        if without_padding(config, mask, arguments["attention_mask"]):
            mask = None
        held = self.cache.layers[layer]
        past = held.get_seq_length()  # a tensor where the cache is static: not read here
        length = held.max_cache_len if self.static else past + hidden.shape[1]
        inputs = {
            "attention_mask": causal_mask(
                config,
                hidden,
                past=past,
                key_length=length,
                valid=keys.valid_keys(length, mask),
                static=self.static,
            ),
        }
        positions, shift = arguments["position_ids"], keys.shift(mask)
        if shift is not None:
            positions = positions - shift
            inputs["position_embeddings"] = self.parts.text.rotary_emb(
                hidden, position_ids=positions
            )
        inputs["position_ids"] = positions if self.takes_positions else None
        return inputs
