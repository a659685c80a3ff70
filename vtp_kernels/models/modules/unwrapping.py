"""What people put around a model, and the model inside.

Adapters (peft), data parallelism and torch.compile wrap a model in a module of their own, which
calls it. Hooks on what is inside see every call that goes through a wrapper, whichever came first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vtp_kernels._shown import shown

__all__ = ["inside", "own", "passed_to", "refuse_replicas"]

# Names of the child that a wrapper calls: torch.compile; DistributedDataParallel, DataParallel and
# DeepSpeed; FullyShardedDataParallel; PeftModel; its tuners, as LoraModel. Looked up among a
# module's own children: peft's wrappers answer for the attributes of what they wrap.
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "base_model", "model")


def inside(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself and whatever it may be the wrapper of, from the outside in.

    Raises TypeError for what is no module, NotImplementedError for DataParallel on several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model that is loaded, got {shown(model)}")
    found: nn.Module | None = model
    while found is not None:
        yield found
        if isinstance(found, PreTrainedModel):
            return
        devices = getattr(found, "device_ids", None) or ()
        if isinstance(found, nn.DataParallel) and len(devices) > 1:
            raise NotImplementedError(
                f"model: DataParallel on {len(devices)} devices copies the model in every call, "
                "and what is noted of a call would be lost with the copies; use "
                "DistributedDataParallel, or apply to the model itself with device_map='auto'"
            )
        children = found._modules
        found = next((children[name] for name in WRAPPED if children.get(name) is not None), None)


def own(module: nn.Module) -> nn.Module:
    """A part of a model without the wrappers around it. Of an adapter that has a whole copy in its
    place (peft's modules_to_save): the part it was made from."""
    while True:
        children, names = module._modules, (*WRAPPED, "original_module")
        found = [children[name] for name in names if children.get(name) is not None]
        if not found:
            return module
        module = found[0]


def refuse_replicas(module: nn.Module) -> None:
    """Raise NotImplementedError if a module is one of the copies that DataParallel made of it, as
    where it was put around the model later."""
    if getattr(module, "_is_replica", False):
        raise NotImplementedError(
            "model: DataParallel on several devices copies the model in every call, and what is "
            "noted of a call would be lost with the copies; use DistributedDataParallel"
        )


def passed_to(top: nn.Module) -> dict[str, Any]:
    """`logits_to_keep` and `labels` of the call of `top.forward` that is under way in this thread.

    For calls that went past the hooks of `top`: some wrappers (peft's AdaLoRA) call its forward
    instead of itself, and what is inside of it is not told these. So look for the caller; its
    frame is a few steps up from the hook. Empty where `top` is not running.
    """
    if torch.compiler.is_compiling():
        return {}
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is top:
            given = frame.f_locals.get("kwargs", {}) | frame.f_locals
            return {name: given[name] for name in ("logits_to_keep", "labels") if name in given}
        frame = frame.f_back
    return {}
