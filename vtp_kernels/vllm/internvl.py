"""InternVL in vLLM, of whose image tokens the best of all tiles stay: checkpoints of transformers
and those in their first format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .budget import Budget
from .checks import check_intern, check_ranks
from .choice import similarity_to_whole
from .processing import BudgetInfo, BudgetProcessor
from .seeing import OutsideGraphs, PrunedImages, stays, watching

__all__ = ["PrunedInternVL", "PrunedInternVLChat"]


class TilesInfo(BudgetInfo):
    def check_budget(self, budget: Budget) -> None:
        check_intern(budget, self.get_hf_config())


class InternVLBudgetInfo(TilesInfo, InternS1ProcessingInfo):
    pass


class InternVLBudgetProcessor(BudgetProcessor, InternS1MultiModalProcessor):
    of_images = "image_num_patches"


class InternVLChatBudgetInfo(TilesInfo, InternVLProcessingInfo):
    def check_budget(self, budget: Budget) -> None:
        super().check_budget(budget)
        check_ranks(budget, self.mm_config, "the attention in all tiles")


class InternVLChatBudgetProcessor(BudgetProcessor, InternVLMultiModalProcessor):
    of_images = "image_num_patches"


class PrunedTiles(PrunedImages):
    """A row shows a square of patches of a tile, and has the mean of their scores."""

    pixels: str

    def _tower(self) -> tuple[Any, Any]:
        """The vision tower, and the attention that made the features."""
        raise NotImplementedError

    def _embed_best(self, images: Any, budget: Budget) -> Any:
        tower, attention = self._tower()
        with watching(tower, attention) as sight:
            rows = self.extract_feature(images[self.pixels])  # [T, N, C]
        tiles = [int(count) for count in images["num_patches"]]
        if budget.score == "divprune":
            return [stays(image.flatten(0, 1), None, budget) for image in rows.split(tiles)]
        if budget.score == "attention":
            scores = self._squares(sight.attention(cls=True)[..., None])[..., 0]
        else:
            squares = self._squares(sight.hidden[:, 1:])
            scores = similarity_to_whole(torch.cat((sight.hidden[:, :1], squares), 1), cls=True)
        return [
            stays(image.flatten(0, 1), of_image.flatten(), budget)
            for image, of_image in zip(rows.split(tiles), scores.split(tiles), strict=True)
        ]

    def _squares(self, patches: Tensor) -> Tensor:
        """[T, N, C]: the mean over the patches that each row of a tile shows, of [T, M, C]."""
        count = patches.shape[1]
        side = round(count**0.5)
        order = torch.arange(count, dtype=torch.float64).view(1, side, side, 1)
        folded = self.pixel_shuffle(order, scale_factor=self.downsample_ratio)
        index = folded.reshape(-1, folded.shape[-1]).long().to(patches.device)
        return patches[:, index].mean(2)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLBudgetProcessor,
    info=InternVLBudgetInfo,
    dummy_inputs=InternS1ForConditionalGeneration._processor_factory.dummy_inputs,
)
class PrunedInternVL(PrunedTiles, InternS1ForConditionalGeneration):
    pixels = "pixel_values"

    def _tower(self) -> tuple[Any, Any]:
        return self.vision_tower, self.vision_tower.encoder.layer[-1].attention


@MULTIMODAL_REGISTRY.register_processor(
    InternVLChatBudgetProcessor,
    info=InternVLChatBudgetInfo,
    dummy_inputs=InternVLChatModel._processor_factory.dummy_inputs,
)
class PrunedInternVLChat(OutsideGraphs, PrunedTiles, InternVLChatModel):
    pixels = "pixel_values_flat"

    def _tower(self) -> tuple[Any, Any]:
        return self.vision_model, self.vision_model.encoder.layers[-1].attn
