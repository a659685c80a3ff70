"""Qwen2-VL in vLLM, of whose image tokens the best stay."""

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridInfo, GridProcessor, PrunedGrids

__all__ = ["PrunedQwen2VL"]


class Qwen2VLBudgetInfo(GridInfo, Qwen2VLProcessingInfo):
    pass


class Qwen2VLBudgetProcessor(GridProcessor, Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLBudgetProcessor, info=Qwen2VLBudgetInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VL(PrunedGrids, Qwen2VLForConditionalGeneration):
    pass
