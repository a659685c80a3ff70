"""LLaVA-OneVision in vLLM, of whose image tokens the best of all crops stay. Its videos take vLLM's
own course."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
    get_anyres_image_grid_shape,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtp_kernels.models.towers.crops import places_of, tokens_at

from .budget import Budget
from .checks import check_siglip
from .choice import scores_of_rows
from .processing import BudgetInfo, BudgetProcessor
from .seeing import PrunedImages, stays, watching

__all__ = ["PrunedLlavaOnevision"]


class OnevisionBudgetInfo(BudgetInfo, LlavaOnevisionProcessingInfo):
    def check_budget(self, budget: Budget) -> None:
        check_siglip(budget, self.get_hf_config())


class OnevisionBudgetProcessor(BudgetProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    OnevisionBudgetProcessor,
    info=OnevisionBudgetInfo,
    dummy_inputs=LlavaOnevisionForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedLlavaOnevision(PrunedImages, LlavaOnevisionForConditionalGeneration):
    hf_to_vllm_mapper = (
        LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | PrunedImages.tower_names
    )

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        with watching(self.vision_tower, attention) as sight:
            rows = self._process_image_input(images)
        scores = sight.scores(budget.score, cls=False)
        if scores is None:
            return [stays(image, None, budget) for image in rows]
        views = [len(image) for image in images["pixel_values"]]
        return [
            stays(image, scores_of_rows(of_image, self._shows(size, *of_image.shape)), budget)
            for image, size, of_image in zip(
                rows, images["image_sizes"], scores.split(views), strict=True
            )
        ]

    def _shows(self, size: Tensor, views: int, tokens: int) -> Tensor:
        """int64 [R], on the CPU: the token that each row of an image shows, or is nearest to where
        the image is scaled down; -1 for `image_newline`.

        By vLLM's own packing, told where a token stands instead of what it looks like.
        """
        grid = (0, 0)
        if views > 1:
            grid = get_anyres_image_grid_shape(
                size.tolist(),
                self.config.image_grid_pinpoints,
                self.config.vision_config.image_size,
            )
        side = round(tokens**0.5)
        packed = self._merge_image_patch_embeddings(
            size,
            places_of(*grid, side),
            image_newline=torch.full((2,), -1.0, dtype=torch.float64),
            strategy="spatial_unpad",
        )
        return tokens_at(packed, grid[1], side)
