"""Pixtral: pictures of any size, one behind the other, that attend to themselves alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..vision import Seen
from .layers import Layers, Place, scale_of
from .packed import received_in_segments
from .ragged import seen_ragged, squares
from .tower import LastLayer, Tower

__all__ = ["LightOnTower", "MergedPixtralTower", "PixtralLayers", "PixtralTower"]


class PixtralLayers(Layers):
    models = ("pixtral",)
    places = (Place("transformer.layers", "attention", ("q_proj", "k_proj")),)
    functions = ("apply_rotary_pos_emb",)

    def _prefix(self) -> int:
        return 0

    def received(
        self,
        attention: nn.Module,
        arguments: Mapping[str, Any],
        given: Mapping[str, Any],
        backend: str | None,
    ) -> Tensor:
        """float32 [R], over the rows of all pictures."""
        query, key = (x[0].transpose(0, 1) for x in self.heads(attention, arguments))
        lengths = [rows * columns for rows, columns in self.grids(given)]
        return received_in_segments(query, key, lengths, scale_of(attention), backend)

    def heads(self, attention: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        query, key = super().heads(attention, arguments)  # [1, H, R, D]
        rotary = self.function("apply_rotary_pos_emb")
        return rotary(query, key, *arguments["position_embeddings"], unsqueeze_dim=0)

    def grids(self, given: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of every picture."""
        sizes, patch = given.get("image_sizes"), self.model.config.patch_size
        if sizes is None:
            pictures, _, *size = given["pixel_values"].shape
            sizes = [size] * pictures
        return [(h // patch, w // patch) for h, w in torch.as_tensor(sizes).tolist()]


class PixtralTower(Tower):
    """LLaVA: every patch is a visual token. Line breaks between them are text."""

    models = PixtralLayers.models
    ragged = True
    side = 1

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, scores: Tensor | None
    ) -> Seen:
        tokens, first = [], 0
        for rows, columns in self.layers.grids(given):
            tokens.append(first + squares(rows, columns, self.side))
            first += rows * columns
        return seen_ragged(self._states(given, output)[0], scores, tokens)


class MergedPixtralTower(PixtralTower):
    """Mistral 3: a visual token shows a square of patches."""

    @property
    def side(self) -> int:
        return self.base.config.spatial_merge_size


class LightOnTower(LastLayer, MergedPixtralTower):
    """LightOnOCR."""

    place = "vision_encoder"
