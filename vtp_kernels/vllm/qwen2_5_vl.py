"""Qwen2.5-VL in vLLM, of whose image tokens the best stay. Its videos take vLLM's own course."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_kernels.contract.counts import moved

from .grids import GridsBudgetInfo, GridsBudgetProcessor, PrunedGrids

__all__ = ["PrunedQwen25VL"]


class Qwen25VLBudgetInfo(GridsBudgetInfo, Qwen2_5_VLProcessingInfo):
    pass


class Qwen25VLBudgetProcessor(GridsBudgetProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLBudgetProcessor,
    info=Qwen25VLBudgetInfo,
    dummy_inputs=Qwen2_5_VLForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedQwen25VL(PrunedGrids, Qwen2_5_VLForConditionalGeneration):
    def _in_order(self, scores: Tensor, grids: list[list[int]]) -> Tensor:
        """The tower sorts squares by windows."""
        order, done = [], 0
        for grid in grids:
            index, _ = self.visual.get_window_index_thw(*grid)
            order.append(done + index)
            done += len(index)
        return scores[moved(torch.cat(order).argsort(), scores.device)]
