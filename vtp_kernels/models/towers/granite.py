"""Granite Docling, and Granite 4 Vision."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor

from .crops import CroppedTower
from .idefics import IdeficsLayers, IdeficsTower

__all__ = ["DoclingLayers", "DoclingTower", "QueriedTower"]


class DoclingLayers(IdeficsLayers):
    models = ("granite_docling_vision",)


class DoclingTower(IdeficsTower):
    """Granite Docling. There are two ways for its tiles, with squares of patches in two sizes."""

    models = DoclingLayers.models
    videos = False

    def _fold(self, given: Mapping[str, Any], order: Tensor) -> Tensor:
        connector = self.base.vision_model.connector
        path = connector.coarse if given.get("tile_fine_mask") is None else connector.fine
        return path.pixel_shuffle(order.view(1, -1, 1), path.scale_factor)


class QueriedTower(CroppedTower):
    """Granite 4 Vision: crops as LLaVA-NeXT. A visual token asks a window of patches what they
    show, by the mean of those in its own place, and has what these have. It is given features of
    several layers; the deepest counts."""

    models = ("clip_vision_model", "siglip_vision_model")

    def _layer(self, given: Mapping[str, Any]) -> int:
        config, states = self.base.config, len(self.attentions) + 1
        layers = [layer for layer, _ in config.deepstack_layer_map]
        return max(layer % states for layer in (*layers, config.spatial_vision_layer))

    def _tokens(self, modality: str, given: Mapping[str, Any], patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        fewer = int(side * Fraction(self.base.config.downsample_rate))
        return sys.modules[type(self.base).__module__].interpolate_downsample(patches, side, fewer)

    def _packed(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return self.base.pack_image_features(*args, **kwargs)
