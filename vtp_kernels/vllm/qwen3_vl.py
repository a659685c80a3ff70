"""Qwen3-VL in vLLM, with experts and without, of whose image tokens the best stay. What the tower
adds after the first layers lies beside a row, and leaves with it. Videos take vLLM's own course."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridsBudgetInfo, GridsBudgetProcessor, PrunedGrids

__all__ = ["PrunedQwen3VL", "PrunedQwen3VLMoe"]


_dummy_inputs = Qwen3VLForConditionalGeneration._processor_factory.dummy_inputs


class Qwen3VLBudgetInfo(GridsBudgetInfo, Qwen3VLProcessingInfo):
    pass


class Qwen3VLMoeBudgetInfo(GridsBudgetInfo, Qwen3VLMoeProcessingInfo):
    pass


class Qwen3VLBudgetProcessor(GridsBudgetProcessor, Qwen3VLMultiModalProcessor):
    pass


class PrunedDeepstack(PrunedGrids):
    def _shown(self, rows: Tensor) -> Tensor:
        return rows[:, : self.visual_dim]

    def _by_stages(self, positions: Tensor, embeddings: Tensor) -> Tensor:
        rows = len(embeddings)
        planes = self._get_deepstack_input_embeds(rows)
        found = self.passage(positions, embeddings, list(planes.tensors.values()) if planes else ())
        self._clear_deepstack_input_embeds(rows)
        return found


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLBudgetProcessor, info=Qwen3VLBudgetInfo, dummy_inputs=_dummy_inputs
)
class PrunedQwen3VL(PrunedDeepstack, Qwen3VLForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLBudgetProcessor, info=Qwen3VLMoeBudgetInfo, dummy_inputs=_dummy_inputs
)
class PrunedQwen3VLMoe(PrunedDeepstack, Qwen3VLMoeForConditionalGeneration):
    pass
