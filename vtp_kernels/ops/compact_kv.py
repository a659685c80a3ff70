"""compact_kv: keep the chosen rows of a KV cache, all layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtp_kernels import reference

from . import _checks
from ._dispatch import choose, kernel, rowwise
from ._fakes import register_fake

Layers = tuple[Tensor, ...]


def compact_kv(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Layers, Layers]:
    """Moves the chosen rows of every layer's keys and values to the front, in one launch.

    Args:
        keys, values: L tensors [B, Hkv, S, D] each, of any dtype; S may differ between layers, the
            key and the value of a layer agree in shape.
        indices: int64 [B, K], [L, B, K] or [L, B, Hkv, K]: rows to keep, strictly ascending. What
            stands past the count is ignored.
        counts: int32 or int64, shape of `indices` without K: how many indices are real. None: all
            K.
        in_place: False: new tensors [B, Hkv, K, D], rows past the count zero. True: row
            `indices[..., j]` moves to row j of the same storage and nothing else is touched; the
            last dimension must have stride 1 and no two elements may share memory.
        backend: "native", "triton", "reference" or None for the fastest that can serve.

    Returns:
        (keys, values), tuples of L tensors; the very same tensors when in place.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU, and on a GPU after
            `vtp_kernels.debug(True)`, also indices out of range or not ascending.
        TypeError: a dtype that is not supported.
        NotImplementedError: inputs that require grad, a backend that cannot serve.
    """
    keys, values = tuple(keys), tuple(values)
    _check(keys, values, indices, counts, in_place)
    if not keys:
        return keys, values
    op = "compact_kv_" if in_place else "compact_kv"
    backend = choose(op, indices, backend)
    if _checks.must_read(indices, backend):
        _check_rows(keys, indices, counts)
    if backend == "reference":
        return reference.compact_kv(keys, values, indices, counts, in_place=in_place)
    move = kernel(op, backend)
    indices, counts = rowwise(indices), rowwise(counts)
    try:
        if in_place:
            move(keys, values, indices, counts)
            return keys, values
        rows = move([rowwise(x) for x in keys], [rowwise(x) for x in values], indices, counts)
    except RuntimeError:
        if _checks.may_read(indices):
            _check_rows(keys, indices, counts)
        raise
    return tuple(rows[: len(keys)]), tuple(rows[len(keys) :])


def _check(
    keys: Layers, values: Layers, indices: Tensor, counts: Tensor | None, in_place: bool
) -> None:
    if len(values) != len(keys):
        raise ValueError(f"values must have as many layers as keys, {len(keys)}, got {len(values)}")
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor [B, K], got {type(indices).__name__}")
    device = indices.device
    batch, heads = _check_layers(keys, values, device)
    if in_place:
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            _check_in_place(f"keys[{layer}]", key)
            _check_in_place(f"values[{layer}]", value)
    any_ = _checks.ANY
    layouts = {
        2: ("B, K", (batch, any_)),
        3: ("L, B, K", (len(keys), batch, any_)),
        4: ("L, B, Hkv, K", (len(keys), batch, heads, any_)),
    }
    either = ("B, K] or [L, B, K] or [L, B, Hkv, K", (batch, any_))
    layout, sizes = layouts.get(indices.dim(), either)
    _checks.tensor("indices", indices, layout, sizes, _checks.INT64)
    if counts is not None:
        layout = layout.removesuffix(", K")
        sizes = tuple(indices.shape[:-1])
        _checks.tensor("counts", counts, layout, sizes, _checks.INTS, device)
    _checks.inference_only("compact_kv", *keys, *values)


def _check_layers(keys: Layers, values: Layers, device: torch.device) -> tuple[int, int]:
    """Returns batch size and heads, which all layers share."""
    batch, heads = _checks.ANY, _checks.ANY
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        # Most caches are alike in all layers: a comparison is a third of a check.
        if layer == 0 or not _alike(key, keys[0]):
            sizes = (batch, heads, _checks.ANY, _checks.ANY)
            dtypes = (key.dtype,) if isinstance(key, Tensor) else ()
            _checks.tensor(f"keys[{layer}]", key, "B, Hkv, S, D", sizes, dtypes, device)
            batch, heads = key.shape[:2]
        if not _alike(value, key):
            sizes, dtypes = tuple(key.shape), (key.dtype,)
            _checks.tensor(f"values[{layer}]", value, "B, Hkv, S, D", sizes, dtypes, device)
    return batch, heads


def _alike(x: Tensor, y: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    )


def _check_rows(keys: Layers, indices: Tensor, counts: Tensor | None) -> None:
    lengths = [key.shape[2] for key in keys]
    if indices.dim() == 2 or len(set(lengths)) == 1:
        _checks.row_indices(indices, counts, min(lengths))
        return
    for layer, length in enumerate(lengths):
        layer_counts = None if counts is None else counts[layer]
        _checks.row_indices(indices[layer], layer_counts, length)


def _check_in_place(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension to be compacted in place, "
            f"got strides {x.stride()}"
        )
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if size > 1 and stride == 0:
            raise ValueError(
                f"{name} must not share memory between its elements to be compacted in place, "
                f"got strides {x.stride()}"
            )


@register_fake("compact_kv")
def _(keys, values, indices, counts):
    width = indices.shape[-1]
    return [x.new_empty(x.shape[0], x.shape[1], width, x.shape[3]) for x in (*keys, *values)]


@register_fake("compact_kv_")
def _(keys, values, indices, counts):
    return None
