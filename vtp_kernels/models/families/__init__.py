"""Model families: where a model keeps its layers, and which of its input rows are visual tokens.

A family is a page: one file here, and one line in FAMILIES. Everything else in this package sees
only `ModelParts`.
"""

from __future__ import annotations

import transformers
from torch import nn

from ..modules.unwrapping import inside
from .aria import Aria
from .cohere2_vision import AyaVision, Cohere2Vision
from .cosmos3 import Cosmos3Edge
from .deepseek_vl import DeepseekVL, DeepseekVLHybrid, Janus
from .ernie4_5_vl import Ernie45VL
from .exaone4_5 import Exaone45
from .family import Family, ModelParts
from .gemma3 import Gemma3
from .glm4v import Glm4v, Glm4vMoe, Glm46v, GlmOcr
from .got_ocr2 import GotOcr2
from .granite4_vision import Granite4Vision
from .granite_docling import GraniteDocling
from .hyperclovax import HyperClovaX
from .idefics3 import Idefics2, Idefics3, SmolVLM
from .internvl import InternVL, QianfanOcr
from .lfm2_vl import Lfm2VL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .minicpmv import MiniCPMOcr, MiniCPMV46, MiniCPMV47
from .mistral3 import LightOnOcr, Mistral3
from .ovis2 import Ovis2
from .paddleocr_vl import PaddleOcrVL
from .paligemma import PaliGemma
from .qwen2_vl import Qwen2VL, Qwen25Omni, Qwen25VL
from .qwen3_5 import Qwen35, Qwen35Moe
from .qwen3_vl import Qwen3OmniMoe, Qwen3VL, Qwen3VLMoe
from .refused import why_refused
from .video_llama_3 import VideoLlama3
from .video_llava import VideoLlava
from .vipllava import VipLlava

__all__ = ["FAMILIES", "Family", "ModelParts", "parts_of"]

FAMILIES: dict[str, Family] = {
    page.name: page
    for page in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        LlavaNextVideo(),
        VipLlava(),
        InternVL(),
        QianfanOcr(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen25Omni(),
        Qwen3VL(),
        Qwen3VLMoe(),
        Qwen3OmniMoe(),
        Qwen35(),
        Qwen35Moe(),
        MiniCPMV46(),
        MiniCPMV47(),
        MiniCPMOcr(),
        Lfm2VL(),
        Cosmos3Edge(),
        Glm4v(),
        Glm4vMoe(),
        Glm46v(),
        GlmOcr(),
        Mistral3(),
        LightOnOcr(),
        Idefics3(),
        SmolVLM(),
        Idefics2(),
        GraniteDocling(),
        Granite4Vision(),
        DeepseekVL(),
        DeepseekVLHybrid(),
        Janus(),
        GotOcr2(),
        PaddleOcrVL(),
        Aria(),
        Ovis2(),
        VideoLlama3(),
        VideoLlava(),
        HyperClovaX(),
        Ernie45VL(),
        PaliGemma(),
        Gemma3(),
        Cohere2Vision(),
        AyaVision(),
        Exaone45(),
    )
}

WHICH_ARE = "`python -m vtp_kernels models` lists the models that are."


def parts_of(model: nn.Module) -> ModelParts:
    """The parts of a supported model, or of the one in a wrapper (peft, DistributedDataParallel,
    torch.compile ...). Raises NotImplementedError with the reason, if one is known."""
    around = []
    for found in inside(model):
        names = {cls.__name__ for cls in type(found).__mro__}
        for page in FAMILIES.values():
            if names.intersection(page.architectures):
                _check_version(page)
                return ModelParts.of(page, found)
        around.append(type(found).__name__)
    reason = why_refused(found)
    named = " around ".join(around)
    raise NotImplementedError(
        f"{named} is not supported{f': {reason}' if reason else ''}.\n{WHICH_ARE}"
    )


def _check_version(page: Family) -> None:
    if page.is_too_new:
        raise NotImplementedError(
            f"{page.architectures[0]} is taken from transformers {page.since} on, and "
            f"{transformers.__version__} is installed.\n{WHICH_ARE}"
        )
