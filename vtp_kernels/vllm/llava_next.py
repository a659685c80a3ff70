"""LLaVA-NeXT in vLLM, of whose image tokens the best of each crop stay."""

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

from .choice import best_rows
from .processing import BudgetInfo, BudgetProcessor
from .seeing import PrunedImages
from .stages.model import Staged

__all__ = ["PrunedLlavaNext"]


class LlavaNextBudgetInfo(BudgetInfo, LlavaNextProcessingInfo):
    pass


class LlavaNextBudgetProcessor(BudgetProcessor, LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextBudgetProcessor,
    info=LlavaNextBudgetInfo,
    dummy_inputs=LlavaNextForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedLlavaNext(Staged, PrunedImages, LlavaNextForConditionalGeneration):
    hf_to_vllm_mapper = (
        LlavaNextForConditionalGeneration.hf_to_vllm_mapper | PrunedImages.tower_names
    )

    def _embed_best(self, images: Any, keep: int, score: str) -> Any:
        pixels = images["pixel_values"]  # [B, V, 3, h, w], or a list of [V, 3, h, w]
        views = [len(image) for image in pixels]
        hidden, scores = self._see(torch.cat(tuple(pixels)), score)
        width, first, kept = scores.shape[1], 0, []
        for size, count in zip(images["image_sizes"], views, strict=True):
            shows = self._shows(size, count, width)
            if keep < len(shows):
                stays = best_rows(scores[first : first + count], shows, keep)
            else:
                stays = shows.to(scores.device)
            kept.append(torch.where(stays < 0, -1, stays + first * width))
            first += count
        tokens = torch.cat(kept)
        features = hidden[:, 1:].flatten(0, 1)[tokens.clamp(min=0)]
        rows = self.multi_modal_projector(features)
        newline = self.image_newline.to(rows.dtype)
        return torch.where(tokens[:, None] < 0, newline, rows).split([len(rows) for rows in kept])

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
