"""VideoLLaMA 3: pictures and frames of any size, one behind the other, each scaled down in the end
by a factor of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_kernels.contract.vision import Ask, Seen

from .layers import Place
from .qwen import QwenLayers
from .ragged import runs, seen_ragged
from .tower import LastLayer, Tower

__all__ = ["ScaledTower", "VideoLlamaLayers"]


class VideoLlamaLayers(QwenLayers):
    models = ("video_llama_3_vision",)
    places = (Place("encoder.layers", "self_attn", ("q_proj", "k_proj")),)


class ScaledTower(LastLayer, Tower):
    """What patches got is scaled down as their states are: a visual token has the mean of the
    patches in its square, where these are four or one. Of larger squares it shows the middle."""

    models = VideoLlamaLayers.models
    place = "vision_model"
    videos = ragged = True

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        grid = torch.as_tensor(given[f"{modality}_grid_thw"])
        merges = torch.as_tensor(given[f"{modality}_merge_sizes"])
        values = {}
        for ask, rows in looked.items():
            scaled = self.layers.model.pixel_unshuffle(rows.view(len(rows), -1), grid, merges)
            values[ask] = scaled.view(-1, *rows.shape[1:])
        grids = [
            (h // merge, w // merge)
            for (t, h, w), merge in zip(grid.tolist(), merges.tolist(), strict=True)
            for _ in range(t)
        ]
        tokens = runs([h * w for h, w in grids])
        return seen_ragged(self._states(given, output), values, tokens, grids)

    def handed_on(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Without tokens of frames that are as in the frame before."""
        # Waits for a GPU, as the model does for the same mask.
        mask = arguments.get("video_compression_mask")
        return {} if mask is None else {"video": mask.bool().cpu()}
