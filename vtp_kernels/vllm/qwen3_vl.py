"""Qwen3-VL in vLLM, with experts and without, of whose image tokens the best stay. What the tower
adds in later layers (deepstack) stands beside a token's row, and leaves with it."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridInfo, GridProcessor, PrunedGrids

__all__ = ["PrunedQwen3VL", "PrunedQwen3VLMoe"]


class Qwen3VLBudgetInfo(GridInfo, Qwen3VLProcessingInfo):
    pass


class Qwen3VLMoeBudgetInfo(GridInfo, Qwen3VLMoeProcessingInfo):
    pass


class Qwen3VLBudgetProcessor(GridProcessor, Qwen3VLMultiModalProcessor):
    pass


class DeepstackGrids(PrunedGrids):
    def _features(self, rows: Tensor) -> Tensor:
        return rows[:, : self.visual_dim]


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLBudgetProcessor, info=Qwen3VLBudgetInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(DeepstackGrids, Qwen3VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLBudgetProcessor, info=Qwen3VLMoeBudgetInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLMoe(DeepstackGrids, Qwen3VLMoeForConditionalGeneration):
    pass
