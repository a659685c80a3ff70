"""A forward pass on a pruned cache that brings no images: decoding, or a further turn of text.

Nothing leaves here. Layers only need masks, and closed-up positions, that fit the keys they hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache import KeyRows, PrunedCache, is_static, past_length
from .families import ModelParts
from .masks import causal_mask, mask_of, padding_of

__all__ = ["Continuation"]


class Continuation:
    """The state of one such pass. Masks are made once per stage, at its first layer."""

    def __init__(self, parts: ModelParts, cache: PrunedCache) -> None:
        self.parts = parts
        self.cache = cache
        self.static = is_static(cache)
        self.keys: KeyRows | None = None  # those of the layer before, and its inputs
        self.inputs: dict[str, Any] = {}

    @classmethod
    def open(
        cls, parts: ModelParts, cache: PrunedCache, arguments: dict[str, Any]
    ) -> Continuation | None:
        """None where the model's own inputs serve every layer, as when decoding without padding."""
        embeddings = arguments.get("inputs_embeds")
        rows = (embeddings if embeddings is not None else arguments["input_ids"]).shape[1]
        if rows > 1:
            _mark_padding(cache, mask_of(arguments), rows)
        # Without padding the model makes no mask for a single new row (but where attention is
        # eager or the cache static), and the row attends to all keys there are, however many.
        unmasked = rows == 1 and not cache.vtp.padded and not is_static(cache)
        if unmasked and parts.text.config._attn_implementation != "eager":
            stages = (keys for _, keys in cache.vtp.stages())
            if all(keys.valid is None and keys.shift is None for keys in stages):
                return None
        return cls(parts, cache)

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
        held = self.cache.layers[layer]
        past = held.get_seq_length()  # a tensor where the cache is static: not read here
        length = held.max_cache_len if self.static else past + hidden.shape[1]
        mask = causal_mask(
            self.parts.text.config,
            hidden,
            past=past,
            key_length=length,
            valid=keys.valid_keys(length),
            static=self.static,
        )
        inputs = {"attention_mask": mask, "position_ids": None}
        if keys.shift is not None:
            positions = arguments["position_ids"] - keys.shift
            inputs["position_embeddings"] = self.parts.text.rotary_emb(
                hidden, position_ids=positions
            )
        return inputs


def _mark_padding(cache: PrunedCache, attention_mask: Any, rows: int) -> None:
    """Note padding among new rows, as in a further turn of conversations of different lengths."""
    past = int(cache.get_seq_length()) if attention_mask is not None else 0
    real = padding_of(attention_mask, rows, past)
    if real is not None and not bool(real.all()):
        cache.vtp.padded = True
        for layer, keys in cache.vtp.stages():
            keys.mark(past_length(cache, layer), real)
