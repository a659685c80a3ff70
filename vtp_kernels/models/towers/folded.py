"""Families that lay the patches of a square side by side, of pictures of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .tower import LastLayer, Tower

__all__ = ["AyaTower", "CohereTower", "FoldedTower"]


class FoldedTower(Tower):
    """A visual token shows a square of patches, and has the mean of what they have."""

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        squares = self.patches_of_tokens(given, patches.shape[1]).to(patches.device)
        return patches[:, squares].mean(2)

    def shows(self, given: Mapping[str, Any], pictures: int, tokens: int) -> Tensor:
        return torch.arange(pictures * tokens)

    def patches_of_tokens(self, given: Mapping[str, Any], count: int) -> Tensor:
        """int64 [N, P]: which of a picture's `count` patches each visual token shows."""
        folded = self._fold(given, torch.arange(count, dtype=torch.float64))
        return folded.reshape(-1, folded.shape[-1]).long()

    def _fold(self, given: Mapping[str, Any], order: Tensor) -> Tensor:
        """What the model makes of patches that have the one channel `order` [M]: those of a token
        lie side by side in the last dimension."""
        raise NotImplementedError


class AyaTower(FoldedTower):
    """Aya Vision."""

    models = ("siglip_vision_model",)

    def _fold(self, given: Mapping[str, Any], order: Tensor) -> Tensor:
        return self.base.multi_modal_projector.pixel_shuffle(order.view(1, -1, 1))


class CohereTower(LastLayer, AyaTower):
    """Command-A Vision."""
