"""Idefics 3, SmolVLM: tiles of one size, with a mask over patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp_kernels._shown import shown

from .folded import FoldedTower
from .layers import Layers
from .tower import LastLayer

__all__ = ["IdeficsLayers", "IdeficsTower"]


class IdeficsLayers(Layers):
    """SigLIP with a mask over patches, where pictures do not fill their square."""

    models = ("idefics2_vision", "idefics3_vision", "smolvlm_vision")

    def _prefix(self) -> int:
        return 0

    def valid(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Tensor | None:
        # The mask of a picture is the same for all of its rows; the mask's form is the backend's.
        mask = arguments.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise NotImplementedError(
                f"attention_mask: expected a tensor in the vision tower, got {shown(mask)}; load "
                "it with another attention implementation"
            )
        mask = mask if mask.dim() == 2 else mask[:, 0, 0]
        return mask == 0 if mask.is_floating_point() else mask.bool()


class IdeficsTower(LastLayer, FoldedTower):
    """Frames of videos come as pictures."""

    models = ("idefics3_vision", "smolvlm_vision")
    place = "vision_model"
    videos = True

    def _fold(self, given: Mapping[str, Any], order: Tensor) -> Tensor:
        connector = self.base.connector
        return connector.pixel_shuffle(order.view(1, -1, 1), connector.scale_factor)
