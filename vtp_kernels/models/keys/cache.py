"""What a KV cache must remember once rows have left: it travels with the cache, not the model.

After pruning, layers hold different numbers of keys, and different ones of them are padding. Both
must survive `copy.deepcopy`, beam search, cropping of rejected drafts and the next turn of a
conversation, so they are kept on the cache object itself: `prune_cache` gives the object a subclass
of its own class, whose methods also move what is remembered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedCache,
    QuantizedLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .reach import LayerKind

__all__ = [
    "AtWork",
    "CacheState",
    "KeyRows",
    "PrunedCache",
    "attended",
    "check_cache",
    "is_quantized",
    "is_static",
    "layers_letting_go",
    "let_go",
    "past_length",
    "prune_cache",
    "put_away",
    "why_no_forgetting",
]

# Layers that attend to exact keys as long as these are new, and to rounded ones later. Transformers
# 5.17 has but the one kind, which quantizes in groups.
_QUANTIZED = (QuantizedLayer, getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer))
_PLAIN = (DynamicLayer, StaticLayer, LinearAttentionLayer)


# Layers that let go of what is out of their window. They count by the rows they hold, which are
# never more than those given: so what is within the window, by column, is always there.
_SLIDING = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


class KeyRows:
    """Which of the model's input rows the keys of a layer are. Shared by a stage's layers.

    Rows are known by their column: where they stand in an attention mask over all rows that the
    model was given. So a mask that comes with a later call says of every key whether it counts.

    Parameters
    ----------
    columns : int64 [B, n]
        Of the first n keys; -1 for one that only fills up a shorter prompt, and never counts.
    end : int
        The column of key n. Keys beyond n are the rows given since, in order.
    filled : bool
        Whether any column is -1.
    left : bool [B, L] or None
        The columns that left and that the model's positions still count, where rows close up. None
        where positions are original.
    """

    # Room for keys to come, so that most decode steps need nothing but a view of `columns`.
    HEADROOM = 128

    def __init__(self, columns: Tensor, end: int, filled: bool, left: Tensor | None) -> None:
        self.columns = columns
        self.offset = end - columns.shape[1]
        self.filled = filled
        self.left = left

    def columns_of(self, length: int) -> Tensor:
        """int64 [B, length]: the columns of so many keys."""
        known = self.columns.shape[1]
        if length > known:
            more = torch.arange(known, length + self.HEADROOM, device=self.columns.device)
            more = (more + self.offset).expand(self.columns.shape[0], -1)
            self.columns = torch.cat((self.columns, more), dim=1)
        return self.columns[:, :length]

    def valid_keys(self, length: int, mask: Tensor | None) -> Tensor | None:
        """Which of so many keys count: bool [B, length], or None if all do. `mask` bool [B, C] says
        so of the columns; None: of all."""
        if mask is None and not self.filled:
            return None
        columns = self.columns_of(length)
        real = columns >= 0
        if mask is None:
            return real
        # Columns beyond the mask are of keys to come, to which nothing attends yet.
        return real & mask.gather(1, columns.clamp(0, mask.shape[1] - 1))

    def shift(self, mask: Tensor | None) -> Tensor | None:
        """What to subtract from the model's positions, int64 [B, 1]: the rows that left, of those
        that count under a mask. None where positions are original."""
        if self.left is None:
            return None
        left = self.left if mask is None else self.left & mask[:, : self.left.shape[1]]
        return left.sum(1, keepdim=True)

    def crop(self, length: int) -> None:
        """Forget what is known of keys beyond `length`."""
        self.columns = self.columns[:, :length]

    def take_rows(self, index: Tensor) -> None:
        """Rearrange the batch: row b becomes what row index[b] was."""
        self.columns = self.columns.index_select(0, index.to(self.columns.device))
        if self.left is not None:
            self.left = self.left.index_select(0, index.to(self.left.device))


@dataclass
class AtWork:
    """Whether a method is at work in its model: `on` until it is taken off, were it in the middle
    of a call."""

    on: bool = True


@dataclass
class CacheState:
    """What is remembered of a cache as a whole."""

    layers: list[KeyRows | None]
    """The key rows of every layer; None where the model's own masks and positions are right."""
    removed: int
    """Rows that layer `counted` lacks of what the model was given."""
    prompt: int
    """Rows of layer `counted` up to the end of the last prompt that lost rows."""
    counted: int = 0
    """The layer by which the model counts what it was given: the first that holds keys."""
    padding: Tensor | None = None
    """bool [B, C]: columns that were padding when rows left, and left with them; None if none."""
    served: AtWork | None = None
    """The method that serves the call under way, which knows of all this; None between calls."""
    observed: frozenset[int] = frozenset()
    """Layers of which to keep what their attention got, for caches that put it away at once."""
    attended: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values that the last of these got, by layer."""

    def stop_observing(self) -> None:
        """Once all decisions have been made."""
        self.observed, self.attended = frozenset(), {}

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
        """For layer 0, which stands for the one the model counts positions by: rows given, not rows
        held."""
        length = super().get_seq_length(layer_idx)
        return length + self.vtp.removed if layer_idx == 0 else length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """As many rows as were given, in whichever layer the model makes its masks for."""
        return self.get_seq_length(layer_idx) + (self._lacks(layer_idx) if layer_idx else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Of the layers by which the model makes its masks and looks for padding in the one it was
        given: as many columns as rows were given."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return (length if is_static(self) else length + self._lacks(layer_idx)), offset

    def _lacks(self, layer: int) -> int:
        """Rows that a layer lacks of what the model was given."""
        if layer == 0:
            return self.vtp.removed
        rows = self.vtp.layers[layer] if layer < len(self.vtp.layers) else None
        return 0 if rows is None else rows.offset

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        self._check_served()
        attended = super().update(key, value, layer_idx, *args, **more)
        if layer_idx in self.vtp.observed:
            self.vtp.attended = {layer_idx: attended}
        return attended

    def get_conv_state(self, layer_idx: int, *args: Any, **more: Any) -> Any:
        """With this a layer of linear attention begins, before it changes its state."""
        self._check_served()
        return super().get_conv_state(layer_idx, *args, **more)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **more: Any) -> Any:
        """The same in transformers 5.17, where a layer asks about itself."""
        if layer_idx is not None:
            self._check_served()
        return super().has_previous_state(layer_idx, *args, **more)

    def _check_served(self) -> None:
        if self.vtp.served is None or not self.vtp.served.on:
            raise RuntimeError(
                "past_key_values: visual tokens have left this cache, and no pruning method is at "
                "work in the model that is to go on from it: its layers would see each other's "
                "future, or padding. Go on within `with vtp.prune(...)`, or keep the handle of "
                "vtp.apply(...) on; or encode the conversation anew"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse_quantized("batch_select_indices")
        rows = torch.arange(self._batch(), device=indices.device)[indices]
        super().batch_select_indices(indices)
        self._take_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_quantized("batch_repeat_interleave")
        batch = self._batch()
        super().batch_repeat_interleave(repeats)
        index = torch.arange(batch, device=self._counted.keys.device)
        self._take_rows(index.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        self._refuse_quantized("crop")
        if tokens_to_remove > 0:  # up to transformers 5.17: the length to crop to
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if tokens_to_remove and any(map(_has_one_state, self.layers)):
            # Transformers (5.23) takes rows out of the convolutions, and leaves them in the states.
            raise RuntimeError(
                "cannot crop a cache with linear attention: its layers have one state for all "
                "rows, out of which none can be taken"
            )
        appended = self._counted.get_seq_length() - self.vtp.prompt
        if -tokens_to_remove > appended:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the {appended} behind the prompt "
                "can be told apart, since layers hold different parts of a pruned prompt"
            )
        for layer in self.layers:  # transformers finds out when some layers have been cropped
            if getattr(layer, "record_past", True):
                continue
            if type(layer) in _SLIDING and layer.get_seq_length() < layer.sliding_window:
                continue
            raise RuntimeError(
                "cannot crop layers with a sliding window or a convolution: they have let go of "
                "what came back into it; call activate_past_recording() on the cache before the "
                "rows come"
            )
        super().crop(tokens_to_remove)
        for layer, rows in self.vtp.stages():
            rows.crop(self.layers[layer].get_seq_length())

    def _refuse_quantized(self, name: str) -> None:
        if is_quantized(self):
            raise NotImplementedError(
                f"{name}: transformers does this to the last rows of a quantized cache alone, not "
                "to those it has quantized; use a DynamicCache"
            )

    def reset(self) -> None:
        super().reset()
        self.forget()

    def forget(self) -> None:
        """Be a plain cache again."""
        self.__class__ = self.plain_class()
        del self.vtp

    def __reduce__(self) -> tuple:  # the class made by _pruned_class cannot be found by name
        return _restore, (self.plain_class(), self.__dict__)

    def _take_rows(self, index: Tensor) -> None:
        for _, rows in self.vtp.stages():
            rows.take_rows(index)
        padding = self.vtp.padding
        if padding is not None:
            self.vtp.padding = padding.index_select(0, index.to(padding.device))

    @property
    def _counted(self) -> Any:
        return self.layers[self.vtp.counted]

    def _batch(self) -> int:
        return self._counted.keys.shape[0]

    def plain_class(self) -> type:
        """The class that the cache had before rows left it."""
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


def _has_one_state(layer: Any) -> bool:
    """Whether a layer has taken rows into a recurrent state."""
    initialized = getattr(layer, "is_recurrent_states_initialized", {})
    return any(initialized.values())


def check_cache(cache: Any, kinds: Sequence[LayerKind] = ()) -> None:
    """Raise NotImplementedError for caches whose layers do not keep, in order, all rows that the
    model's layers, of these `kinds`, may look at; those of linear attention keep none."""
    if type(cache) is DynamicCache and _is_plain(cache):
        return
    known = isinstance(cache, DynamicCache | StaticCache | QuantizedCache) or type(cache) is Cache
    other = _others(cache, kinds)
    if known and not other:
        return
    what = type(cache).__name__
    if other:
        what += f" with layers of {', '.join(sorted(kind.__name__ for kind in other))}"
    why = "only caches whose layers keep all rows, in order, can lose some and go on"
    if StaticSlidingWindowLayer in other:
        why = "a full sliding window moves its slots, and compiled code would not know their rows"
    elif any(getattr(kind, "is_sliding", False) for kind in other):
        why = "the model's layers have other windows than the cache's, which lets go of rows"
    raise NotImplementedError(
        f"past_key_values: {what} is not supported: {why}; use a DynamicCache (the default), a "
        "StaticCache or a QuantizedCache with full attention, offloaded or not"
    )


def _others(cache: Any, kinds: Sequence[LayerKind]) -> set[type]:
    """The kinds of a cache's layers that do not keep what they must."""
    windows = [kind.window for kind in kinds]
    windows += [None] * (len(getattr(cache, "layers", ())) - len(windows))
    sliding = {
        type(layer)
        for layer, window in zip(getattr(cache, "layers", ()), windows, strict=False)
        if type(layer) in _SLIDING and not _keeps_window(layer, window)
    }
    return sliding | {k for k in _kinds(cache) if k not in _SLIDING and not _keeps_all(k)}


def _keeps_window(layer: Any, window: int | None) -> bool:
    if window is None:
        return False
    if type(layer) is StaticSlidingWindowLayer:
        return layer.max_cache_len < window  # it has room for all that will ever come
    return layer.sliding_window == window


def _is_plain(cache: Any) -> bool:
    """Whether all layers are of the plain kinds: nearly always, and soon found out."""
    if getattr(cache, "layer_class_to_replicate", None) not in (None, *_PLAIN):
        return False
    return all(type(layer) in _PLAIN for layer in cache.layers)


def _kinds(cache: Any) -> set[type]:
    """The classes of a cache's layers, and of those it has yet to make."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    later = getattr(cache, "layer_class_to_replicate", None)
    return kinds if later is None else kinds | {getattr(later, "func", later)}


def _keeps_all(kind: type) -> bool:
    return kind in _PLAIN or issubclass(kind, _QUANTIZED)


def is_quantized(cache: Any) -> bool:
    return not _is_plain(cache) and any(issubclass(kind, _QUANTIZED) for kind in _kinds(cache))


def why_no_forgetting(cache: Any) -> str | None:
    """Why rows cannot be taken out of a layer of a cache that holds them, or None if they can."""
    if is_static(cache):
        return "a StaticCache keeps room for all rows"
    if is_quantized(cache):
        return "a QuantizedCache holds rows in groups that share their scales"
    if cache.offloading:
        return "an offloaded cache has moved its layers away"
    if layers_letting_go(cache):
        return "layers with a sliding window have let go of rows already"
    return None


def put_away(cache: Any) -> bool:
    """Whether the layers of a cache do not hold what their attention got, or not where it was."""
    return cache.offloading or is_quantized(cache) or bool(layers_letting_go(cache))


def layers_letting_go(cache: Any) -> frozenset[int]:
    """Layers of a cache (or None) that let go of rows that are out of their window."""
    layers = enumerate(() if cache is None else cache.layers)
    return frozenset(index for index, layer in layers if type(layer) is DynamicSlidingWindowLayer)


def attended(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, N, D] that a layer's attention got last. A static cache has unused
    slots behind them.

    Raises NotImplementedError where they have been put away, and nobody kept them.
    """
    if isinstance(cache, PrunedCache) and layer in cache.vtp.attended:
        return cache.vtp.attended[layer]
    if put_away(cache):
        raise NotImplementedError(
            f"past_key_values: {type(cache).__name__} has quantized, moved or let go of what layer "
            f"{layer} attended to, so no scores can be had from it; use a DynamicCache that is not "
            "offloaded and has no sliding windows"
        )
    held = cache.layers[layer]
    return held.keys, held.values


def past_length(cache: Any, layer: int) -> int:
    """Keys that `layer` of a cache (or None) holds, or held where it has a sliding window. Waits
    for the GPU if the cache is static."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def let_go(cache: Any, layer: int, rows: int) -> int:
    """How many of its earliest keys a layer of a cache (or None) no longer has when `rows` more
    come. A static one that is taken at all has room for everything."""
    held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
    return held.get_mask_sizes(rows)[1] if type(held) is DynamicSlidingWindowLayer else 0


def is_static(cache: Any) -> bool:
    return isinstance(cache, Cache) and cache.is_compileable
