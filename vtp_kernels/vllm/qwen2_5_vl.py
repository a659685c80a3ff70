"""Qwen2.5-VL in vLLM, of whose image tokens the best stay."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .budget import KEY, Budget
from .grids import Grid, GridInfo, GridProcessor, PrunedGrids

__all__ = ["PrunedQwen2_5_VL"]


class Qwen2_5_VLBudgetInfo(GridInfo, Qwen2_5_VLProcessingInfo):
    def check_budget(self, budget: Budget) -> None:
        super().check_budget(budget)
        vision = self.get_hf_config().vision_config
        if budget.score == "attention" and vision.depth - 1 not in vision.fullatt_block_indexes:
            raise NotImplementedError(
                f"{KEY}.score: the last layer of this vision tower looks at windows, and not at "
                "images; use 'similarity' or 'divprune'"
            )


class Qwen2_5_VLBudgetProcessor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLBudgetProcessor,
    info=Qwen2_5_VLBudgetInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(PrunedGrids, Qwen2_5_VLForConditionalGeneration):
    def _in_order(self, scores: Tensor, grids: list[Grid]) -> Tensor:
        made = self.visual.prepare_encoder_metadata([list(grid) for grid in grids])
        return scores[made["reverse_indices"].to(scores.device)]
