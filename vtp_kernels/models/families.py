"""Model families: where a model keeps its layers, and which of its input rows are visual tokens.

A family is one entry in FAMILIES. Everything else in this package sees only `ModelParts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .positions import POSITIONS
from .ranks import all_heads
from .unwrapping import inside

__all__ = ["FAMILIES", "Family", "ModelParts", "parts_of"]


@dataclass(frozen=True)
class ModelParts:
    """The places of a model that the engine attaches to."""

    family: str
    top: nn.Module
    """The model that users call; its forward knows `logits_to_keep` and `labels`."""
    base: nn.Module
    """The model that puts image features between the text embeddings."""
    text: nn.Module
    """The decoder stack; its `rotary_emb` makes the position embeddings of all layers."""
    layers: nn.ModuleList
    has_images: Callable[[dict[str, Any]], bool]
    """Whether the arguments of a call bring image features. Looks at no tensor's values."""
    visual_tokens: Callable[[dict[str, Any]], Tensor]
    """bool [B, S]: which rows of a call's input are visual tokens."""
    first_layer: int = 0
    """The first layer before which rows may leave."""
    positions: tuple[str, ...] = POSITIONS
    """What the `positions` of `apply` may be."""


@dataclass(frozen=True)
class Family:
    architectures: tuple[str, ...]
    """Class names of the models, or of one of their base classes."""
    text_models: tuple[str, ...]
    """`model_type` of the text configs whose attention the engine knows how to read."""
    grid_positions: bool = False
    """Whether a visual token's position is a time, a row and a column, so that an image takes fewer
    positions than it has tokens, and there is no telling where rows would close up to."""
    first_layer: Callable[[Any], int] = lambda config: 0
    """Of the model's config: the first layer before which rows may leave."""
    limits: tuple[str, ...] = ()
    """What does not go, for `supported_models`."""

    @property
    def positions(self) -> tuple[str, ...]:
        return ("original",) if self.grid_positions else POSITIONS


class Modality:
    """Pictures or videos: what a call brings them in, and the token that stands for them.

    Both are visual tokens. Frames of InternVL come as pictures.
    """

    def __init__(self, name: str, pixels: str, token: str) -> None:
        self.name, self.pixels, self.token = name, pixels, token

    def comes_with(self, arguments: dict[str, Any]) -> bool:
        # generate() encodes the pictures before it calls the model, a plain call does so inside it.
        encoded = arguments.get("mm_encoder_outputs") or {}
        return arguments.get(self.pixels) is not None or encoded.get(self.name) is not None


MODALITIES = (
    Modality("image", "pixel_values", "image_token_id"),
    Modality("video", "pixel_values_videos", "video_token_id"),
)


def _rows_of(token: int, base: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """bool [B, S]: which rows of the input are placeholders of that token."""
    if arguments.get("input_ids") is not None:
        return arguments["input_ids"] == token
    # Given embeddings instead of ids, the placeholders are those that equal its embedding.
    embeddings = arguments["inputs_embeds"]
    placeholder = torch.full((), token, device=embeddings.device)  # through the module: its weight
    return (embeddings == base.get_input_embeddings()(placeholder)).all(-1)  # may be in pieces


def _parts(model: nn.Module, name: str, family: Family) -> ModelParts:
    base = model.model

    def has_images(arguments: dict[str, Any]) -> bool:
        return any(modality.comes_with(arguments) for modality in MODALITIES)

    def visual_tokens(arguments: dict[str, Any]) -> Tensor:
        here = [modality for modality in MODALITIES if modality.comes_with(arguments)]
        first, *others = (
            _rows_of(getattr(base.config, modality.token), base, arguments) for modality in here
        )
        for rows in others:
            first = first | rows
        return first

    return ModelParts(
        family=name,
        top=model,
        base=base,
        text=base.language_model,
        layers=base.language_model.layers,
        has_images=has_images,
        visual_tokens=visual_tokens,
        first_layer=family.first_layer(model.config),
        positions=family.positions,
    )


FAMILIES = {
    "llava": Family(
        architectures=("LlavaForConditionalGeneration",),
        text_models=("llama", "mistral", "qwen2", "qwen3"),
    ),
    "llava_next": Family(
        architectures=("LlavaNextForConditionalGeneration",),
        text_models=("llama", "mistral", "qwen2"),
    ),
    "llava_onevision": Family(
        architectures=("LlavaOnevisionForConditionalGeneration",),
        text_models=("qwen2",),
    ),
    "internvl": Family(
        architectures=("InternVLForConditionalGeneration",),
        text_models=("llama", "qwen2", "qwen3"),
    ),
    "qwen2_5_vl": Family(
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        text_models=("qwen2_5_vl_text",),
        grid_positions=True,
        limits=("InflectionPruning: source='attention' is not known of its vision tower",),
    ),
    "qwen3_vl": Family(
        architectures=("Qwen3VLForConditionalGeneration",),
        text_models=("qwen3_vl_text",),
        grid_positions=True,
        # After each of the first layers it adds features of the vision tower to the visual rows,
        # by a mask over all rows there were: they must still be there.
        first_layer=lambda config: len(config.vision_config.deepstack_visual_indexes),
        limits=("rows leave only after the deepstack layers: from layer 3 on in released models",),
    ),
}


def parts_of(model: nn.Module) -> ModelParts:
    """The parts of a supported model, or of the one in a wrapper (peft, DistributedDataParallel,
    torch.compile ...). Raises NotImplementedError with what is supported."""
    around = []
    for found in inside(model):
        names = {cls.__name__ for cls in type(found).__mro__}
        for name, family in FAMILIES.items():
            if names.intersection(family.architectures):
                _check_text_model(found, family)
                return _parts(found, name, family)
        around.append(type(found).__name__)
    raise NotImplementedError(
        f"{' around '.join(around)} is not supported. Supported are: {_supported()}"
    )


def _check_text_model(model: nn.Module, family: Family) -> None:
    text = model.model.language_model
    config = text.config
    if config.model_type not in family.text_models:
        raise NotImplementedError(
            f"{type(model).__name__} with a {config.model_type!r} text model is not "
            f"supported. Supported are: {_supported()}"
        )
    sliding = [kind for kind in getattr(config, "layer_types", None) or () if "sliding" in kind]
    if sliding or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        raise NotImplementedError(
            "a text model with sliding-window attention is not supported: its window counts rows, "
            "and rows that leave would move it; where all prompts and answers fit into the window, "
            "load the model with sliding_window=None in its text config"
        )
    all_heads(text.layers[0].self_attn)


def _supported() -> str:
    return "; ".join(
        f"{name}: {', '.join(family.architectures)} with text models "
        f"{', '.join(family.text_models)}"
        for name, family in FAMILIES.items()
    )
