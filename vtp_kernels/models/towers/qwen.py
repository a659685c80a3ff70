"""Qwen's vision models, and those like them: pictures and frames of any size, one behind the other.

Their attention is a segment's own affair: a picture's or frame's, or in most layers of Qwen2.5-VL
a window's. What one layer computes is what is scored, windows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_kernels.contract.counts import moved
from vtp_kernels.contract.vision import Ask, Seen

from .layers import Place
from .packed import PackedLayers
from .ragged import runs, seen_ragged
from .tower import Tower

__all__ = [
    "CosmosLayers",
    "ErnieTower",
    "ExaoneLayers",
    "HyperClovaTower",
    "QwenLayers",
    "QwenTower",
]

ROTARY, WINDOWS = "apply_rotary_pos_emb_vision", "get_vision_window_index"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
OMNI = ("qwen2_5_omni_vision_encoder", "qwen3_omni_moe_vision_encoder")
GLM = ("glm4v_vision", "glm4v_moe_vision", "glm_ocr_vision")
ERNIE = ("ernie4_5_vl_moe_vision",)


class QwenLayers(PackedLayers):
    """Rows that lie one behind the other, all rotated; `cu_seqlens` says where segments end."""

    models = (*QWEN, *(f"{name}_vision" for name in QWEN), *OMNI, *GLM, *ERNIE)
    places = (Place("blocks", "attn", ("qkv",)), Place("blocks", "attn", ("q", "k")))
    normed = True

    @property
    def functions(self) -> tuple[str, ...]:  # of some models more than of others
        return (ROTARY, WINDOWS) if self.windowed else (ROTARY,)

    def segments(self, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[int]:
        # Waits for a GPU, as the model does for the same numbers.
        return arguments["cu_seqlens"].diff().tolist()

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        rows = arguments["hidden_states"]
        made = [getattr(attention, name)(rows) for name in self.projections]
        if len(made) == 1:
            made = made[0].chunk(3, dim=1)  # queries, keys, values
        query, key = (states.view(len(rows), attention.num_heads, -1) for states in made[:2])
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        return self.rotated(query, key, arguments)

    def rotated(self, query: Tensor, key: Tensor, arguments: Mapping[str, Any]) -> Any:
        return self.function(ROTARY)(query, key, *arguments["position_embeddings"])

    @property
    def windowed(self) -> bool:
        return hasattr(self.model, "window_size")


class ExaoneLayers(QwenLayers):
    """Fewer heads have keys than queries."""

    models = ("exaone4_5_vision",)
    places = (Place("blocks", "attn", ("qkv",)),)

    def heads(
        self, attention: nn.Module, arguments: Mapping[str, Any], from_cls: bool
    ) -> tuple[Tensor, Tensor]:
        rows = arguments["hidden_states"]
        widths = (attention.q_dim, attention.kv_dim, attention.kv_dim)
        query, key, _ = attention.qkv(rows).split(widths, dim=1)
        shape = (len(rows), -1, attention.head_dim)
        return self.rotated(query.view(shape), key.view(shape), arguments)


class CosmosLayers(QwenLayers):
    """Nothing is rotated."""

    models = ("cosmos3_edge_vision",)
    places = (Place("encoder.layers", "self_attn", ("q_proj", "k_proj")),)

    @property
    def functions(self) -> tuple[str, ...]:
        return ()

    def rotated(self, query: Tensor, key: Tensor, arguments: Mapping[str, Any]) -> Any:
        return query, key


class QwenTower(Tower):
    """A visual token shows a square of patches, which the tower merges. It has the mean of what
    they have in a layer, the last one by default; the features are what was merged.

    A frame of a video is a picture of its own, for no frame attends to another.
    """

    models = (*QwenLayers.models, *ExaoneLayers.models, *CosmosLayers.models)
    place = "visual"
    videos = ragged = True

    def read(
        self, modality: str, given: Mapping[str, Any], output: Any, looked: Mapping[Ask, Tensor]
    ) -> Seen:
        grid = torch.as_tensor(given[f"{modality}_grid_thw"])
        together, side = self._together(modality), self.layers.model.config.spatial_merge_size
        sizes = [(t // together, h // side, w // side) for t, h, w in grid.tolist()]
        looked = {ask: x.unflatten(0, (-1, side * side)).mean(1) for ask, x in looked.items()}
        if self.layers.windowed and looked:
            order = self._unwindowed(modality, given, grid)
            looked = {ask: x[moved(order, x.device)] for ask, x in looked.items()}
        if together > 1:
            looked = {ask: _frames_as_one(x, sizes, together) for ask, x in looked.items()}
        grids = [(h, w) for frames, h, w in sizes for _ in range(frames)]
        rows = torch.cat(list(output.pooler_output))
        return seen_ragged(rows, looked, runs([h * w for h, w in grids]), grids)

    def _together(self, modality: str) -> int:
        """How many frames, each of which attends to itself, a visual token shows."""
        return 1

    def _layer(self, given: Mapping[str, Any]) -> int:
        return len(self.attentions)

    def _unwindowed(self, modality: str, given: Mapping[str, Any], grid: Tensor) -> Tensor:
        """Where the tower, which sorts the squares of patches by windows, has each of them."""
        vision = self.layers.model
        names = ("window_index", "cu_window_seqlens")  # computed before, perhaps
        index, _ = self.layers.function(WINDOWS)(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
            kwargs={name: given.get(f"{modality}_{name}") for name in names},
        )
        return index.cpu().argsort()


def _frames_as_one(x: Tensor, sizes: list[tuple[int, int, int]], together: int) -> Tensor:
    """The mean of so many frames each, of videos with (frames then, rows, columns)."""
    parts = x.split([frames * together * h * w for frames, h, w in sizes])
    pairs = zip(parts, sizes, strict=True)
    return torch.cat(
        [
            part.unflatten(0, (-1, together, h * w)).mean(1).flatten(0, 1)
            for part, (_, h, w) in pairs
        ]
    )


class HyperClovaTower(QwenTower):
    """HyperCLOVA X Vision."""

    place = "vision_model"


class ErnieTower(QwenTower):
    """ERNIE 4.5 VL. A token of a video shows two frames, which are one picture here."""

    place = "vision_tower"

    def _together(self, modality: str) -> int:
        return self.layers.model.config.temporal_merge_size if modality == "video" else 1
