"""What a KV cache must remember once rows have left: it travels with the cache, not the model.

After pruning, layers hold different numbers of keys, and different ones of them are padding. Both
must survive `copy.deepcopy`, beam search, cropping of rejected drafts and the next turn of a
conversation, so they are kept on the cache object itself: `prune_cache` gives the object a subclass
of its own class, whose methods also move what is remembered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

__all__ = ["CacheState", "KeyRows", "PrunedCache", "check_cache", "past_length", "prune_cache"]


class KeyRows:
    """Which keys of a layer are real, and where its positions stand. Shared by a stage's layers.

    `valid` is bool [B, n] for the first n keys, or None; keys beyond n are real. `shift` is int64
    [B, 1], what to subtract from the model's positions; None where positions are original.
    """

    # Room for keys to come, so that most decode steps need nothing but a view of `valid`.
    HEADROOM = 128

    def __init__(self, valid: Tensor | None, shift: Tensor | None) -> None:
        self.valid = valid
        self.shift = shift

    def valid_keys(self, length: int) -> Tensor | None:
        """bool [B, length], or None if there is no padding."""
        if self.valid is None:
            return None
        missing = length - self.valid.shape[1]
        if missing > 0:
            real = self.valid.new_ones(self.valid.shape[0], missing + self.HEADROOM)
            self.valid = torch.cat((self.valid, real), dim=1)
        return self.valid[:, :length]

    def mark(self, start: int, real: Tensor) -> None:
        """Note that the keys from `start` on are real only where `real` bool [B, n] says so."""
        if self.valid is None:
            self.valid = real.new_ones(real.shape[0], start)
        self.valid = torch.cat((self.valid_keys(start), real), dim=1)

    def crop(self, length: int) -> None:
        """Forget what is known of keys beyond `length`."""
        if self.valid is not None:
            self.valid = self.valid[:, :length]

    def take_rows(self, index: Tensor) -> None:
        """Rearrange the batch: row b becomes what row index[b] was."""
        if self.valid is not None:
            self.valid = self.valid.index_select(0, index.to(self.valid.device))
        if self.shift is not None:
            self.shift = self.shift.index_select(0, index.to(self.shift.device))


@dataclass
class CacheState:
    """What is remembered of a cache as a whole."""

    layers: list[KeyRows | None]
    """The key rows of every layer; None where the model's own masks and positions are right."""
    removed: int
    """Rows that layer 0 lacks of what the model was given."""
    prompt: int
    """Rows of layer 0 up to the end of the last prompt that lost rows."""
    padded: bool
    """Whether any row the model was given is padding, so that it makes masks of its own."""

    def stages(self) -> Iterator[tuple[int, KeyRows]]:
        """Each distinct KeyRows with the first layer it belongs to."""
        seen: set[int] = set()
        for layer, rows in enumerate(self.layers):
            if rows is not None and id(rows) not in seen:
                seen.add(id(rows))
                yield layer, rows


class PrunedCache:
    """Mixed into the class of a cache whose layers have lost rows."""

    vtp: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """For layer 0, the one the model counts positions by: rows given, not rows held."""
        length = super().get_seq_length(layer_idx)
        return length + self.vtp.removed if layer_idx == 0 else length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(torch.arange(self._batch(), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self._batch()
        super().batch_repeat_interleave(repeats)
        index = torch.arange(batch, device=self.layers[0].keys.device)
        self._take_rows(index.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # up to transformers 5.17: the length to crop to
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        appended = self.layers[0].get_seq_length() - self.vtp.prompt
        if -tokens_to_remove > appended:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the {appended} behind the prompt "
                "can be told apart, since layers hold different parts of a pruned prompt"
            )
        super().crop(tokens_to_remove)
        for layer, rows in self.vtp.stages():
            rows.crop(self.layers[layer].get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.__class__ = self._plain_class()
        del self.vtp

    def __reduce__(self) -> tuple:  # the class made by _pruned_class cannot be found by name
        return _restore, (self._plain_class(), self.__dict__)

    def _take_rows(self, index: Tensor) -> None:
        for _, rows in self.vtp.stages():
            rows.take_rows(index)

    def _batch(self) -> int:
        return self.layers[0].keys.shape[0]

    def _plain_class(self) -> type:
        return type(self).__mro__[2]


_pruned_classes: dict[type, type] = {}  # not functools.cache, which torch.compile warns of


def _pruned_class(plain: type) -> type:
    if plain not in _pruned_classes:
        name = f"Pruned{plain.__name__}"
        _pruned_classes[plain] = type(name, (PrunedCache, plain), {"__doc__": plain.__doc__})
    return _pruned_classes[plain]


def _restore(plain: type, attributes: dict[str, Any]) -> PrunedCache:
    cache = object.__new__(_pruned_class(plain))
    cache.__dict__.update(attributes)
    return cache


def prune_cache(cache: Any, state: CacheState) -> None:
    """Make `cache` remember `state`."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned_class(type(cache))
    cache.vtp = state


def check_cache(cache: Any) -> None:
    """Raise NotImplementedError for caches whose layers do not simply hold all keys, in order."""
    plain = isinstance(cache, DynamicCache | StaticCache) and not cache.offloading
    for layer in cache.layers if plain else ():
        plain = plain and type(layer) in (DynamicLayer, StaticLayer)
    if not plain:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        raise NotImplementedError(
            f"past_key_values: {type(cache).__name__} of {kinds} is not supported, only "
            "DynamicCache and StaticCache with full attention, not offloaded"
        )


def past_length(cache: Any, layer: int) -> int:
    """Keys that `layer` of a cache (or None) holds. Waits for the GPU if the cache is static."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def is_static(cache: Any) -> bool:
    return isinstance(cache, Cache) and cache.is_compileable
