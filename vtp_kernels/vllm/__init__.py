"""Pruned LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen-VL and GLM-V in vLLM, as a plugin:
vLLM itself stays as it is.

    VLLM_PLUGINS=vtp_kernels vllm serve llava-hf/llava-1.5-7b-hf \\
        --mm-processor-kwargs '{"images_kwargs": {"vtp": {"keep": 144, "score": "attention"}}}'

Every image then takes `keep` rows of the prompt and of the KV cache, chosen by what the vision
tower saw; see `Budget` for the settings. A request may lower the number by `mm_processor_kwargs` of
its own. For a number that follows from what an image shows, see `encode`.

Nothing of vLLM is imported here, and nothing is registered unless `VLLM_PLUGINS` names the plugin.
"""

import importlib
import os

from .budget import Budget

__all__ = ["Budget", "Encoder", "StagedRequests", "StagedScheduler", "encode", "register"]

PLUGIN = "vtp_kernels"
MODELS = {
    "LlavaForConditionalGeneration": "vtp_kernels.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "vtp_kernels.vllm.llava_next:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": (
        "vtp_kernels.vllm.llava_onevision:PrunedLlavaOnevision"
    ),
    "Qwen2VLForConditionalGeneration": "vtp_kernels.vllm.qwen2_vl:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "vtp_kernels.vllm.qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "vtp_kernels.vllm.qwen3_vl:PrunedQwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "vtp_kernels.vllm.qwen3_vl:PrunedQwen3VLMoe",
    "Glm4vForConditionalGeneration": "vtp_kernels.vllm.glm4v:PrunedGlm4v",
    "Glm4vMoeForConditionalGeneration": "vtp_kernels.vllm.glm4v:PrunedGlm4vMoe",
    "InternVLForConditionalGeneration": "vtp_kernels.vllm.internvl:PrunedInternVL",
    "InternVLChatModel": "vtp_kernels.vllm.internvl:PrunedInternVLChat",
}

#: What is imported when it is asked for.
HOMES = {
    "Encoder": "encoder",
    "encode": "encoder",
    "StagedRequests": "stages.requests",
    "StagedScheduler": "stages.scheduler",
}


def register() -> None:
    """What vLLM calls in each of its processes, by the entry point in `vllm.general_plugins`.

    Without `VLLM_PLUGINS` vLLM calls every plugin that is installed; being installed is not being
    asked for. The classes are imported when a model of theirs is loaded.
    """
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        ModelRegistry.register_model(architecture, place)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'vtp_kernels.vllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vtp_kernels.vllm.{HOMES[name]}"), name)
