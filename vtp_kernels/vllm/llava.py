"""LLaVA-1.5 in vLLM, of whose image tokens the best stay."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_kernels.ops import compact_rows, select_topk

from .budget import KEY, Budget
from .checks import check_clip
from .processing import BudgetInfo, BudgetProcessor
from .seeing import PrunedImages, see_with_cls, stays

__all__ = ["PrunedLlava"]

_plain = LlavaForConditionalGeneration._processor_factory


class LlavaBudgetInfo(BudgetInfo, LlavaProcessingInfo):
    def check_budget(self, budget: Budget) -> None:
        check_clip(budget, self.get_hf_config())


class LlavaBudgetProcessor(BudgetProcessor, LlavaMultiModalProcessor):
    pass


def _info(ctx: Any) -> Any:
    if ctx.get_hf_config().vision_config.model_type != "pixtral":
        return LlavaBudgetInfo(ctx)
    if Budget.of(ctx.get_mm_config().mm_processor_kwargs) is not None:
        raise NotImplementedError(f"{KEY}: the vision tower is a 'pixtral', which has no CLS token")
    return _plain.info(ctx)


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, LlavaBudgetInfo):
        return LlavaBudgetProcessor(info, dummy_inputs)
    return _plain.processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=_plain.dummy_inputs)
class PrunedLlava(PrunedImages, LlavaForConditionalGeneration):
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | PrunedImages.tower_names

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        hidden, scores = see_with_cls(self.vision_tower, images["pixel_values"], budget.score)
        features = hidden[:, 1:]
        if scores is None:
            return [stays(rows, None, budget) for rows in self.multi_modal_projector(features)]
        keep = budget.rows(features.shape[1])
        chosen = select_topk(scores, keep).indices
        (features,) = compact_rows((features,), chosen)
        return self.multi_modal_projector(features)
