"""LLaVA-NeXT in vLLM, of whose image tokens the best stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .budget import Budget
from .checks import check_clip
from .choice import best_rows, scores_of_rows
from .processing import BudgetInfo, BudgetProcessor
from .seeing import PrunedImages, see_with_cls, stays

__all__ = ["PrunedLlavaNext"]


class LlavaNextBudgetInfo(BudgetInfo, LlavaNextProcessingInfo):
    def check_budget(self, budget: Budget) -> None:
        check_clip(budget, self.get_hf_config())


class LlavaNextBudgetProcessor(BudgetProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextBudgetProcessor,
    info=LlavaNextBudgetInfo,
    dummy_inputs=LlavaNextForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedLlavaNext(PrunedImages, LlavaNextForConditionalGeneration):
    hf_to_vllm_mapper = (
        LlavaNextForConditionalGeneration.hf_to_vllm_mapper | PrunedImages.tower_names
    )

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        pixels = images["pixel_values"]  # [B, V, 3, h, w], or a list of [V, 3, h, w]
        views = [len(image) for image in pixels]
        hidden, scores = see_with_cls(self.vision_tower, torch.cat(tuple(pixels)), budget.score)
        first, found = 0, []
        for size, count in zip(images["image_sizes"], views, strict=True):
            features = hidden[first : first + count, 1:]
            shows = self._shows(size, *features.shape[:2])
            if scores is None:
                rows = stays(self._rows(features, shows), None, budget)
            else:
                ranked = scores_of_rows(scores[first : first + count], shows)
                best = best_rows(ranked, budget.rows(len(shows)))
                rows = self._rows(features, shows[best.cpu()])
            found.append(rows)
            first += count
        return found

    def _rows(self, features: Tensor, shows: Tensor) -> Tensor:
        """[R, C]: rows that show these tokens of features [V, N, D]; see `_shows`."""
        shows = shows.to(features.device)
        rows = self.multi_modal_projector(features.flatten(0, 1)[shows.clamp(min=0)])
        return torch.where(shows[:, None] < 0, self.image_newline.to(rows.dtype), rows)

    def _shows(self, size: Tensor, views: int, tokens: int) -> Tensor:
        """int64 [R], on the CPU: the token that each row of an image shows, -1 for `image_newline`.

        By vLLM's own packing, told which token is which instead of what it looks like.
        """
        order = torch.arange(views * tokens, dtype=torch.float64).view(views, tokens, 1)
        packed = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            SimpleNamespace(
                config=self.config, image_newline=torch.full((1,), -1.0, dtype=torch.float64)
            ),
            size,
            order,
            strategy="spatial_unpad",
        )
        return packed[:, 0].long()
