"""Pixtral: pictures of any size, one behind the other, that attend to themselves alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.vision import Ask, Seen

from .layers import Place
from .packed import PackedLayers
from .ragged import cut, seen_ragged
from .tower import LastLayer, Tower

__all__ = ["LightOnTower", "MergedPixtralTower", "PixtralLayers", "PixtralTower"]


class PixtralLayers(PackedLayers):
    models = ("pixtral",)
    places = (Place("transformer.layers", "attention", ("q_proj", "k_proj")),)
    functions = ("apply_rotary_pos_emb",)

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        rows = arguments["hidden_states"]
        states = (self.project(attention, name, rows) for name in self.projections)
        rotary = self.function("apply_rotary_pos_emb")
        query, key = rotary(*states, *arguments["position_embeddings"], unsqueeze_dim=0)
        return query[0].transpose(0, 1), key[0].transpose(0, 1)

    def segments(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.grids(given)]

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
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        grids = self.layers.grids(given)
        return seen_ragged(self._states(given, output)[0], looked, *cut(grids, self.side))


class MergedPixtralTower(PixtralTower):
    """Mistral 3: a visual token shows a square of patches."""

    @property
    def side(self) -> int:
        return self.base.config.spatial_merge_size


class LightOnTower(LastLayer, MergedPixtralTower):
    """LightOnOCR."""

    place = "vision_encoder"
