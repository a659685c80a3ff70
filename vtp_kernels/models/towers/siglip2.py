"""SigLIP2 with pictures of any size (NaFlex): side by side, with padding behind the patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_kernels.contract.vision import Ask, Seen

from .layers import Layers
from .ragged import seen_ragged
from .tower import LastLayer, Tower

__all__ = ["Siglip2Layers", "UnshuffledTower"]


class Siglip2Layers(Layers):
    models = ("siglip2_vision_model",)

    def _prefix(self) -> int:
        return 0

    def valid(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> Tensor:
        return given["pixel_attention_mask"].bool()


class UnshuffledTower(LastLayer, Tower):
    """LFM2-VL: a visual token shows a square of patches, and has the mean of what they have."""

    models = Siglip2Layers.models
    ragged = True

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        states = self._states(given, output)
        tokens = [
            index * states.shape[1] + self._squares(rows, columns)
            for index, (rows, columns) in enumerate(given["spatial_shapes"].tolist())
        ]
        looked = {ask: x.flatten(0, 1) for ask, x in looked.items()}
        side = self.base.multi_modal_projector.factor
        grids = [(h // side, w // side) for h, w in given["spatial_shapes"].tolist()]
        return seen_ragged(states.flatten(0, 1), looked, tokens, grids)

    def _squares(self, rows: int, columns: int) -> Tensor:
        """int64 [N, P]: the patches of a picture that each of its visual tokens shows."""
        order = torch.arange(rows * columns, dtype=torch.float64).view(1, rows, columns, 1)
        shuffled = self.base.multi_modal_projector.pixel_unshuffle(order)
        return shuffled.reshape(-1, shuffled.shape[-1]).long()
