"""Qwen2-VL in vLLM, of whose image tokens the best stay. Its videos take vLLM's own course."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridsBudgetInfo, GridsBudgetProcessor, PrunedGrids

__all__ = ["PrunedQwen2VL"]


class Qwen2VLBudgetInfo(GridsBudgetInfo, Qwen2VLProcessingInfo):
    pass


class Qwen2VLBudgetProcessor(GridsBudgetProcessor, Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLBudgetProcessor,
    info=Qwen2VLBudgetInfo,
    dummy_inputs=Qwen2VLForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedQwen2VL(PrunedGrids, Qwen2VLForConditionalGeneration):
    pass
