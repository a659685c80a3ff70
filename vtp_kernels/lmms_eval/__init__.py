"""Pruned models for lmms-eval, which finds them by an entry point of this package.

    lmms-eval --model llava_hf_vtp \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,vtp=method.json --tasks gqa,pope

`llava_hf_vtp` is its own `llava_hf` (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision) with a method at work.
`vtp` is a file that `method.save(path)` wrote, or a short form such as fastv:2:0.5; all other
arguments are those of `llava_hf`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval asks of an entry point in its group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_hf_vtp",
        simple_class_path="vtp_kernels.lmms_eval.simple.PrunedLlavaHf",
        chat_class_path="vtp_kernels.lmms_eval.chat.PrunedLlavaHf",
    )
