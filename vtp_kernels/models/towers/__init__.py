"""Vision towers: where each family's keeps what is asked of it, and which rows show what.

A tower is two things: a vision model of some kind (`layers.Layers`), whose layers attend, and a
family's way to make visual tokens of its output (`tower.Tower`). What is here is a file a kind.

A tower that has a CLS token scores by it. Where there is none (SigLIP, Pixtral, Qwen) all tokens of
the picture stand in for it: their mean, and the attention that they pay. All tokens of a crop are
on its curve, those too that show padding around the picture and get no row.

Frames of a video are pictures, each with a curve of its own: towers see them one by one, and no
frame is to lose all its tokens to another. A frame is what the tower takes for one, which in Qwen's
is a pair. Where tokens are put together, patches of a picture or of a frame that is scaled down, a
visual token has the mean of what they have.
"""

from __future__ import annotations

from torch import nn

from .crops import CroppedTower, NextVideoTower, ResizedTower
from .dino import Dinov2Layers, Dinov3Layers
from .folded import AyaTower, CohereTower
from .idefics import IdeficsLayers, IdeficsTower
from .internvl import InternLayers, ShuffledTower
from .layers import Layers
from .paddleocr import PaddleLayers, PaddleTower
from .pixtral import LightOnTower, MergedPixtralTower, PixtralLayers, PixtralTower
from .qwen import CosmosLayers, ErnieTower, GlmTower, HyperClovaTower, QwenLayers, QwenTower
from .siglip2 import Siglip2Layers, UnshuffledTower
from .tower import Tower, VideoLlavaTower, VipTower
from .whole import AlignedTower, JanusLayers, PooledTower, WholeTower

__all__ = ["KINDS", "TOWERS", "CroppedTower", "Layers", "Tower", "tower_of", "towers_of"]

KINDS: dict[str, type[Layers]] = {
    name: kind
    for kind in (
        Layers,
        InternLayers,
        Dinov2Layers,
        Dinov3Layers,
        Siglip2Layers,
        PixtralLayers,
        QwenLayers,
        CosmosLayers,
        PaddleLayers,
        JanusLayers,
        IdeficsLayers,
    )
    for name in kind.models
}
"""Kinds of vision models, by their `model_type`."""

TOWERS: dict[str, tuple[type[Tower], ...]] = {
    "llava": (Tower, PixtralTower),
    "llava_next": (CroppedTower,),
    "llava_next_video": (NextVideoTower,),
    "llava_onevision": (ResizedTower,),
    "internvl": (ShuffledTower,),
    "mistral3": (MergedPixtralTower,),
    "lighton_ocr": (LightOnTower,),
    "lfm2_vl": (UnshuffledTower,),
    "qwen2_vl": (QwenTower,),
    "qwen2_5_vl": (QwenTower,),
    "qwen3_vl": (QwenTower,),
    "qwen3_vl_moe": (QwenTower,),
    "qwen3_5": (QwenTower,),
    "qwen3_5_moe": (QwenTower,),
    "qwen2_5_omni_thinker": (QwenTower,),
    "glm4v": (GlmTower,),
    "glm4v_moe": (GlmTower,),
    "glm46v": (GlmTower,),
    "glm_ocr": (GlmTower,),
    "qwen3_omni_moe_thinker": (QwenTower,),
    "cosmos3_edge": (QwenTower,),
    "hyperclovax_vision_v2": (HyperClovaTower,),
    "ernie4_5_vl_moe": (ErnieTower,),
    "video_llava": (VideoLlavaTower,),
    "qianfan_ocr": (ShuffledTower,),
    "paddleocr_vl": (PaddleTower,),
    "vipllava": (VipTower,),
    "paligemma": (WholeTower,),
    "deepseek_vl": (AlignedTower,),
    "janus": (AlignedTower,),
    "gemma3": (PooledTower,),
    "aya_vision": (AyaTower,),
    "cohere2_vision": (CohereTower,),
    "idefics3": (IdeficsTower,),
    "smolvlm": (IdeficsTower,),
}
"""By family, one for each kind of vision model that it may have."""


def towers_of(family: str) -> tuple[type[Tower], ...]:
    """What is known in a family: `models`, `scores` and `videos` of each say of which vision
    models, and what."""
    return TOWERS.get(family, ())


def tower_of(family: str, base: nn.Module) -> Tower | None:
    """What is known of a model's vision tower; None if too little for what methods ask."""
    for tower in towers_of(family):
        vision = getattr(base, tower.place, None)
        kind = None if vision is None else vision.config.model_type
        if kind in tower.models:
            layers = KINDS[kind](getattr(vision, "vision_model", vision))
            return tower(base, layers) if layers.attentions else None
    return None
