"""InternVL: tiles of one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .folded import FoldedTower
from .layers import Layers, Place

__all__ = ["InternLayers", "ShuffledTower"]


class InternLayers(Layers):
    """InternViT, in some sizes with a norm over all heads' queries, and keys."""

    models = ("internvl_vision", "qianfan_ocr_vision")
    places = (
        Place("encoder.layer", "attention", ("q_proj", "k_proj")),
        Place("layers", "attention", ("q_proj", "k_proj")),
    )

    normed = True

    def _prefix(self) -> int:
        return 1

    def project(self, attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
        states = getattr(attention, name)(hidden)
        states = getattr(attention, name.replace("proj", "norm"))(states)
        return states.view(*states.shape[:2], attention.num_heads, -1).transpose(1, 2)


class ShuffledTower(FoldedTower):
    """InternVL. Frames of videos come as pictures."""

    models = InternLayers.models
    videos = True

    def _fold(self, given: Mapping[str, Any], order: Tensor) -> Tensor:
        side = round(len(order) ** 0.5)
        ratio = self.base.config.downsample_ratio
        return self.base.pixel_shuffle(order.view(1, side, side, 1), scale_factor=ratio)

    def _states(self, given: Mapping[str, Any], output: Any) -> Tensor:
        if self._layer(given) == len(self.attentions):
            return output.last_hidden_state  # has a norm behind it, in some models
        return super()._states(given, output)
