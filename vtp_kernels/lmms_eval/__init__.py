"""Pruned models for lmms-eval, which finds them by an entry point of this package.

    lmms-eval --model llava_hf_vtp \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,vtp=method.json --tasks gqa,pope

Each is a model of lmms-eval with a method at work, and is called like it, with `_vtp` behind.
`llava_hf_vtp` (LLaVA-1.5, LLaVA-NeXT, and LLaVA-OneVision, for which it is also named
`llava_onevision_vtp`), `qwen2_5_vl_vtp`, `qwen3_vl_vtp` and `internvl_hf_vtp` run in transformers:
`vtp` is a file that `method.save(path)` wrote, or a short form such as fastv:2:0.5. `vllm_vtp` runs
in vLLM, see `Served`. All other arguments are those of the original.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ORIGINALS", "manifests"]

#: lmms-eval's name of a model, that of its class, and the kinds of task that there is one for.
ORIGINALS = {
    "llava_hf": ("LlavaHf", ("simple", "chat")),
    "qwen2_5_vl": ("Qwen2_5_VL", ("simple", "chat")),
    "qwen3_vl": ("Qwen3_VL", ("simple", "chat")),
    "internvl_hf": ("InternVLHf", ("chat",)),
    "vllm": ("VLLM", ("simple", "chat")),
}
ALIASES = {"llava_hf": ("llava_onevision_vtp",)}


def manifests() -> list[Any]:
    """What lmms-eval asks of an entry point in its group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=f"{model}_vtp",
            **{
                f"{kind}_class_path": f"{__name__}.models.{kind.title()}{original}"
                for kind in kinds
            },
            aliases=ALIASES.get(model, ()),
        )
        for model, (original, kinds) in ORIGINALS.items()
    ]
