"""Vision towers: where each family's keeps what is asked of it, and which rows show what.

A tower is two things: a vision model of some kind (`layers.Layers`), whose layers attend, and a
family's way to make visual tokens of its output (`tower.Tower`). What is here is a file a kind.

A tower that has a CLS token scores by it. Where there is none (SigLIP, Pixtral, Qwen) all tokens of
the picture stand in for it: their mean, and the attention that they pay. All tokens of a crop are
on its curve, those too that show padding around the picture and get no row.

Frames of a video are pictures, each with a curve of its own: towers see them one by one, and no
frame is to lose all its tokens to another. A frame is what the tower takes for one, which in Qwen's
is a pair. Where tokens are put together, patches of a picture or of a frame that is scaled down, a
visual token has the mean of what they have. One that asks the picture for what it shows has it by
how much it reads of each patch; where it asks again and again, nothing of patches is its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .crops import CroppedTower, NextVideoTower, ResizedTower
from .dino import Dinov2Layers, Dinov3Layers
from .folded import AyaTower, CohereTower
from .granite import DoclingLayers, DoclingTower, QueriedTower
from .idefics import IdeficsLayers, IdeficsTower
from .internvl import InternLayers, ShuffledTower
from .layers import Layers
from .minicpm import MiniCPMLayers, MiniCPMTower
from .ovis2 import OvisLayers, OvisTower
from .paddleocr import PaddleLayers, PaddleTower
from .pixtral import LightOnTower, MergedPixtralTower, PixtralLayers, PixtralTower
from .qwen import CosmosLayers, ErnieTower, ExaoneLayers, HyperClovaTower, QwenLayers, QwenTower
from .resampled import AskingTower, PerceiverTower
from .sam import ConvolvedTower, SamLayers
from .siglip2 import Siglip2Layers, UnshuffledTower
from .tower import Tower, VideoLlavaTower, VipTower
from .video_llama import ScaledTower, VideoLlamaLayers
from .whole import AlignedTower, JanusLayers, PooledTower, WholeTower

__all__ = [
    "KINDS",
    "AlignedTower",
    "AskingTower",
    "AyaTower",
    "CohereTower",
    "ConvolvedTower",
    "CroppedTower",
    "DoclingTower",
    "ErnieTower",
    "HyperClovaTower",
    "IdeficsTower",
    "Layers",
    "LightOnTower",
    "MergedPixtralTower",
    "MiniCPMTower",
    "NextVideoTower",
    "OvisTower",
    "PaddleTower",
    "PerceiverTower",
    "PixtralTower",
    "PooledTower",
    "QueriedTower",
    "QwenTower",
    "ResizedTower",
    "ScaledTower",
    "ShuffledTower",
    "Tower",
    "UnshuffledTower",
    "VideoLlavaTower",
    "VipTower",
    "WholeTower",
    "tower_of",
]

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
        ExaoneLayers,
        CosmosLayers,
        PaddleLayers,
        VideoLlamaLayers,
        JanusLayers,
        IdeficsLayers,
        DoclingLayers,
        SamLayers,
        OvisLayers,
        MiniCPMLayers,
    )
    for name in kind.models
}
"""Kinds of vision models, by their `model_type`."""


def tower_of(known: Iterable[type[Tower]], base: nn.Module) -> Tower | None:
    """What is known of a model's vision tower, of what its family may have; None if too little for
    what methods ask."""
    for tower in known:
        vision = getattr(base, tower.place, None)
        if vision is None:
            continue
        # Some had no type of their own before transformers 5.23.
        kind = vision.config.model_type or f"{base.config.model_type}_vision"
        if kind in tower.models:
            layers = KINDS[kind](getattr(vision, "vision_model", vision))
            known = layers.attentions and tower.is_known(base)
            return tower(base, layers) if known else None
    return None
