"""MiniCPM-V and MiniCPM-OCR: slices of pictures, one behind the other, whose patches are merged
twice: between two layers, and behind the last."""

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

__all__ = ["MiniCPMLayers", "MiniCPMTower"]


class MiniCPMLayers(PackedLayers):
    """SigLIP, whose rows are patches up to a layer, and behind it squares of them."""

    models = ("minicpmv4_6_vision", "minicpmv4_7_vision", "minicpm_ocr_vision")
    places = (Place("encoder.layers", "self_attn", ("q_proj", "k_proj")),)

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        rows = arguments["hidden_states"]
        query, key = (self.project(attention, name, rows)[0] for name in self.projections)
        return query.transpose(0, 1), key.transpose(0, 1)

    def segments(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[int]:
        return arguments["cu_seqlens"].diff().tolist()


class MiniCPMTower(LastLayer, Tower):
    """A visual token shows a square of the last layer's rows, and has the mean of what they have.
    Slices of a picture, and frames of a video, are pictures of their own."""

    models = MiniCPMLayers.models
    videos = ragged = True
    all_layers = False  # earlier ones have other rows

    @staticmethod
    def is_known(base: nn.Module) -> bool:
        return len(set(base.merger.merge_kernel_size)) == 1

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        merger = self.base.merger
        side = merger.merge_kernel_size[0] ** merger.merger_times
        grids = [(rows, columns) for rows, columns in self._grids(modality, given)]
        return seen_ragged(self._states(given, output)[0], looked, *cut(grids, side))

    def _grids(self, modality: str, given: Mapping[str, Any]) -> list[list[int]]:
        """Rows and columns of what the last layer has of each slice or frame."""
        if modality == "image":
            sizes = torch.as_tensor(given["target_sizes"])
        else:  # the pixels of several calls may lie upon each other
            sizes = torch.as_tensor(given["target_sizes_videos"])
            sizes = sizes.repeat(len(given["pixel_values_videos"]), 1)
        mode = given.get("downsample_mode") or self.base.config.downsample_mode
        return (sizes if mode == "4x" else sizes // 2).tolist()
