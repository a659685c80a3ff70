"""GLM-4.1V and GLM-4.5V in vLLM, of whose image tokens the best stay. Their videos take vLLM's own
course."""

from __future__ import annotations

from vllm.model_executor.models.glm4_1v import (
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .grids import GridsBudgetInfo, GridsBudgetProcessor, PrunedGrids

__all__ = ["PrunedGlm4v", "PrunedGlm4vMoe"]

_dummy_inputs = Glm4vForConditionalGeneration._processor_factory.dummy_inputs


class Glm4vBudgetInfo(GridsBudgetInfo, Glm4vProcessingInfo):
    pass


class Glm4vBudgetProcessor(GridsBudgetProcessor, Glm4vMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vBudgetProcessor, info=Glm4vBudgetInfo, dummy_inputs=_dummy_inputs
)
class PrunedGlm4v(PrunedGrids, Glm4vForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vBudgetProcessor, info=Glm4vBudgetInfo, dummy_inputs=_dummy_inputs
)
class PrunedGlm4vMoe(PrunedGrids, Glm4vMoeForConditionalGeneration):
    pass
