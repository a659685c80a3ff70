"""PaddleOCR-VL: pictures of any size, one behind the other; the projector merges their patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_kernels.contract.vision import Ask, Seen

from .layers import Place
from .qwen import QwenLayers
from .ragged import cut, seen_ragged
from .tower import LastLayer, Tower

__all__ = ["PaddleLayers", "PaddleTower"]


class PaddleLayers(QwenLayers):
    models = ("paddleocr_vl_vision",)
    places = (Place("encoder.layers", "self_attn", ("q_proj", "k_proj")),)


class PaddleTower(LastLayer, Tower):
    """A visual token shows a square of patches, and has the mean of what they have."""

    models = PaddleLayers.models
    place = "visual"
    ragged = True

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        sizes = torch.as_tensor(given["image_grid_thw"]).tolist()
        grids = [(rows, columns) for t, rows, columns in sizes for _ in range(t)]
        side = self.base.config.vision_config.spatial_merge_size
        return seen_ragged(self._states(given, output), looked, *cut(grids, side))
