"""Small models with random weights, and pictures for them, of which every family has its own.

They are for tests: on these, pruning is compared with a model in which nothing leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "EXPERTS",
    "IMAGE",
    "LINEAR",
    "PIXTRAL",
    "SHARED",
    "SQUARE",
    "TEXT",
    "VIDEO",
    "VISION",
    "Tiny",
    "TinyVideo",
    "any_size",
    "anyres",
    "clip",
    "crops",
    "frames",
    "siglip",
    "square",
]

IMAGE, VIDEO = 99, 98  # tokens that stand for a picture, and for a video
TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
SHARED = {"shared_expert_intermediate_size": 32}
LINEAR = {  # layers 1, 3 and 5 have full attention
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "full_attention_interval": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SQUARE = {"image_size": 56, "patch_size": 14}

Picture = Callable[[torch.Generator, int], dict[str, Any]]
"""(generator, 0 | 1 | 2) -> what the model is given of one picture, by name. Pictures that come in
several sizes come in three."""


@dataclass(frozen=True)
class TinyVideo:
    """make: as of a picture; the last of three has 64 frames, or grids of them. before, after: the
    words that stand around every frame, and `around` those around the video. None: frames follow
    upon each other. token: what stands for a visual token of it."""

    make: Picture
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    around: tuple[int, ...] = ()
    token: int = VIDEO


@dataclass(frozen=True)
class Tiny:
    """make: the model, 6 decoder layers of 4 query and 2 key heads. types: names of the arguments
    that tell what kind of token each one is, if the model wants to be told: 0 for words. linear:
    whether some layers have linear attention, in which no mask can say of a row that it left.
    side_by_side: whether pictures lie side by side in one row of pixels. around: the words that
    stand around a picture."""

    make: Callable[[], Any]
    picture: Picture
    types: tuple[str, ...] = ()
    type_of_picture: int = 1
    linear: bool = False
    side_by_side: bool = False
    around: tuple[int, ...] = ()
    video: TinyVideo | None = None


PIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 56,
    "patch_size": 14,
}


def clip() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**VISION, **SQUARE, projection_dim=32)


def siglip() -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VISION, **SQUARE, vision_use_head=False)


def square(side: int) -> Picture:
    """Pictures of one size."""

    def picture(generator: torch.Generator, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}

    return picture


def crops(generator: torch.Generator, size: list[int], count: int) -> dict[str, Any]:
    """A picture of that size [height, width]: the whole of it, and `count` crops."""
    return {
        "pixel_values": torch.randn(1 + count, 3, 56, 56, generator=generator),
        "image_sizes": torch.tensor([size]),
    }


def anyres(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Crops side by side; crops upon each other with some of them padding; four crops."""
    return crops(generator, *(([56, 112], 2), ([112, 40], 2), ([112, 112], 4))[index])


def frames(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Videos of 3, 2 or 64 frames. A batch has videos of one length."""
    count = (3, 2, 64)[index]
    return {"pixel_values_videos": torch.randn(1, count, 3, 56, 56, generator=generator)}


def any_size(generator: torch.Generator, index: int) -> dict[str, Any]:
    """Pictures that keep their shape, 4 x 4, 2 x 4 and 4 x 2 patches, padded to the largest."""
    return {
        "pixel_values": torch.randn(1, 3, 56, 56, generator=generator),
        "image_sizes": torch.tensor([[[56, 56], [28, 56], [56, 28]][index]]),
    }
