"""Families that take all that comes out of the tower, of pictures of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .internvl import InternLayers
from .layers import Layers
from .tower import LastLayer, Tower

__all__ = ["AlignedTower", "JanusLayers", "PooledTower", "WholeTower"]


class JanusLayers(InternLayers):
    models = ("janus_vision_model",)
    places = Layers.places

    def _prefix(self) -> int:
        return 0


class WholeTower(LastLayer, Tower):
    """PaliGemma: every patch is a visual token."""

    models = ("siglip_vision_model",)


class AlignedTower(WholeTower):
    """DeepSeek-VL, Janus: as PaliGemma."""

    models = (*WholeTower.models, *JanusLayers.models)
    place = "vision_model"


class PooledTower(WholeTower):
    """Gemma 3: a visual token is the mean of a square of patches."""

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        plane = patches.transpose(1, 2).unflatten(2, (side, side))
        return self.base.multi_modal_projector.avg_pool(plane).flatten(2).transpose(1, 2)
