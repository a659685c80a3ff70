"""Who else looks into a model's modules: by hooks, or by a forward put in front of theirs.

Rows may only be given another shape, or left out, where nobody sees them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .shadow import Shadow

__all__ = ["is_known_forward", "is_watched", "others_look_into"]

# Whose hooks take rows in any shape.
KNOWN = ("vtp_kernels", "transformers", "accelerate", "torch.distributed")


def others_look_into(layer: nn.Module) -> bool:
    """Whether anybody sees the rows within a decoder layer. (Behind it is not within.)"""
    if not all(map(_is_of_known, layer._forward_pre_hooks.values())) or not is_known_forward(layer):
        return True
    return any(is_watched(module) for module in layer.modules() if module is not layer)


def is_watched(module: nn.Module) -> bool:
    """Whether anybody sees what goes into a module, or comes out."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        if hooks and not all(map(_is_of_known, hooks.values())):
            return True
    return not is_known_forward(module)


def is_known_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class, with nothing in front of it but a shadow or
    accelerate's, which moves weights and inputs between devices."""
    forward = vars(module).get("forward")
    if isinstance(forward, Shadow):
        forward = forward.before
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is None or own or hasattr(module, "_hf_hook")


def _is_of_known(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    name = getattr(hook, "__module__", None) if owner is None else type(owner).__module__
    return f"{name}.".startswith(tuple(f"{known}." for known in KNOWN))
