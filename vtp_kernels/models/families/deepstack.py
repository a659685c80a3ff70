"""Features of the vision tower that a model adds to its visual tokens between its first layers
(DeepStack, https://arxiv.org/abs/2406.04334).

The model adds them by a mask over all rows there were. Where rows leave before that, the rows that
are left get theirs here, and the model adds none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Planes"]


class Planes:
    """visual: bool [B, S], the rows of the prompt that get features. features: by the layer before
    which they are added, [N, C]: those of all these rows in order."""

    def __init__(self, visual: Tensor, features: Mapping[int, Tensor]) -> None:
        self.visual, self.features = visual, features
        self.order: Tensor | None = None

    def add(self, layer: int, hidden: Tensor, origin: Tensor, valid: Tensor | None) -> Tensor:
        """Rows [B, K, C] at the entry of a layer, with what is added there. origin int64 [B, K]:
        the rows of the prompt that these are; valid bool [B, K]: False for padding, None if there
        is none."""
        if layer not in self.features:
            return hidden
        visual, features = self.visual.to(hidden.device), self.features[layer].to(hidden)
        if self.order is None:
            self.order = visual.flatten().cumsum(0).view(visual.shape) - 1
        order, here = self.order.gather(1, origin), visual.gather(1, origin)
        if valid is not None:
            here = here & valid
        added = features[torch.where(here, order, 0)]
        return torch.where(here[..., None], hidden + added, hidden)
