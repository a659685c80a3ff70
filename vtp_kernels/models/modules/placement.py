"""Where a model computes, and in what, when its parameters do not tell.

Offloaded parameters (accelerate) are on no device between two calls, those of FSDP are in pieces,
and quantised ones hold packed integers, or are no parameters at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "device_of",
    "is_moved",
    "key_dtype",
    "like_hidden",
    "out_features",
    "own_parameters",
    "why_gone",
]

# What makes a module keep its weights in pieces between two calls.
SHARDED = ("FSDPModule", "FullyShardedDataParallel")
_sharded: dict[type, bool] = {}  # asked in every call, and a class does not change its bases


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's first parameter is on while it is computed with.

    Raises ValueError if nothing tells: the model was made on "meta" and never loaded.
    """
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.device.type != "meta":
                return parameter.device
            device = _execution_device(_hook(part))
            if device is not None:
                return device
    raise ValueError(
        "model: its parameters are on the meta device, and no hook of accelerate's loads them; "
        "load the model's weights first"
    )


def _execution_device(hook: Any) -> torch.device | None:
    """Where accelerate puts a module's parameters while it runs."""
    for one in _each(hook):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def _each(hook: Any) -> tuple[Any, ...]:
    """The hooks that accelerate has put on a module. They may come in a sequence."""
    return getattr(hook, "hooks", (hook,))


def is_moved(module: nn.Module) -> bool:
    """Whether the weights of a module, or what it gets, may be somewhere else until it runs."""
    return _hook(module) is not None or _is_sharded(type(module))


def why_gone(layer: nn.Module) -> str | None:
    """Why the projections of a decoder layer have no weights but while the layer itself runs, or
    None if they can be called at any time.

    Offloaded weights usually can: accelerate loads them for each projection by itself. Without
    weights, a projection does not fail: on a CPU torch multiplies by what happens to be in memory.
    """
    for part in (layer, getattr(layer, "self_attn", None)):
        hook = _hook(part)
        if hook is not None and any(map(_loads_all, _each(hook))):
            return (
                "accelerate loads the layer's weights as a whole, and takes them away when it has "
                "run; leave out preload_module_classes"
            )
        if _is_sharded(type(part)):
            return (
                "fully sharded data parallelism gathers the layer's weights when it runs, and "
                "takes them apart again; do not shard this layer, or shard by heads "
                "(tp_plan='auto')"
            )
    return None


@contextmanager
def own_parameters(module: nn.Module) -> Iterator[None]:
    """Within, parameters of the module itself are there that accelerate has offloaded. It loads
    them when the module runs, and not for what else is computed with them."""
    if _hook(module) is None or not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _is_sharded(kind: type) -> bool:
    if kind not in _sharded:
        _sharded[kind] = any(cls.__name__ in SHARDED for cls in kind.__mro__)
    return _sharded[kind]


def _loads_all(hook: Any) -> bool:
    """Whether a hook of accelerate's loads the weights of modules within modules, too."""
    return getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)


def _hook(module: nn.Module | None) -> Any:
    # Not by getattr: a module that has none looks for it in three more places.
    return getattr(module, "__dict__", {}).get("_hf_hook")


def like_hidden(text: nn.Module) -> Tensor:
    """An empty tensor with the device and dtype of a text model's hidden states."""
    return torch.empty(0, dtype=text.dtype, device=device_of(text))


def key_dtype(cache: Any, text: nn.Module) -> torch.dtype:
    """The dtype in which a cache holds, or is given, keys and values. It need not be that of the
    weights (under autocast it may be wider), which it is taken to be where there is no cache."""
    held = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    keys = next((x for x in held if x is not None), None)
    return text.dtype if keys is None else keys.dtype


def out_features(linear: nn.Module) -> int:
    """How many features a projection has, whatever its weight is kept in.

    A matrix that is as wide as the input tells by itself: a rank's piece of one may sit in a module
    that still names the whole. Quantised weights are packed, have other names or are no tensors,
    and there the module tells. Raises NotImplementedError where it does not.
    """
    weight = getattr(linear, "weight", None)
    columns = getattr(linear, "in_features", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and columns in (None, weight.shape[1]):
        return weight.shape[0]
    for name in ("out_features", "outfeatures"):  # the latter in AutoGPTQ
        features = getattr(linear, name, None)
        if isinstance(features, int):
            return features
    raise NotImplementedError(
        f"{type(linear).__name__} is not supported as a projection: it has neither a weight "
        "[features, inputs] nor out_features, so its width is not known"
    )
