"""Ovis 2: squares of patches, which are words of a visual vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtp_kernels.contract.vision import Ask, Seen

from .layers import Layers, Place
from .tower import LastLayer, Tower, seen_whole

__all__ = ["OvisLayers", "OvisTower"]


class OvisLayers(Layers):
    models = ("ovis2_vision",)
    places = (Place("transformer.encoder.layers", "attention", ("q_proj", "k_proj")),)

    def _prefix(self) -> int:
        return 0


class OvisTower(LastLayer, Tower):
    """A visual token shows a square of patches, and has the mean of what they have."""

    models = OvisLayers.models
    vectors = False

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        stride = self.layers.model.config.hidden_stride
        # The patches of a square come out side by side.
        features = output.last_hidden_state.unflatten(2, (stride**2, -1)).mean(2)
        values = {}
        for ask, scores in looked.items():
            side = round(scores.shape[1] ** 0.5)
            values[ask] = avg_pool2d(scores.view(-1, 1, side, side), stride).flatten(1)
        return seen_whole(features, values)
