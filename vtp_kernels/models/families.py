"""Model families: where a model keeps its layers, and which of its input rows are visual tokens.

A family is one entry in FAMILIES. Everything else in this package sees only `ModelParts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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


@dataclass(frozen=True)
class Family:
    architectures: tuple[str, ...]
    """Class names of the models, or of one of their base classes."""
    text_models: tuple[str, ...]
    """`model_type` of the text configs whose attention the engine knows how to read."""
    parts: Callable[[nn.Module, str], ModelParts]


def _llava_parts(model: nn.Module, family: str) -> ModelParts:
    base = model.model

    def has_images(arguments: dict[str, Any]) -> bool:
        # generate() encodes the pictures before it calls the model, a plain call does so inside it.
        encoded = arguments.get("mm_encoder_outputs") or {}
        return arguments.get("pixel_values") is not None or encoded.get("image") is not None

    def visual_tokens(arguments: dict[str, Any]) -> Tensor:
        token = base.config.image_token_id
        if arguments.get("input_ids") is not None:
            return arguments["input_ids"] == token
        # Given embeddings instead of ids, the placeholders are those that equal its embedding.
        embeddings = arguments["inputs_embeds"]
        placeholder = base.get_input_embeddings().weight[token]
        return (embeddings == placeholder.to(embeddings.device)).all(-1)

    return ModelParts(
        family=family,
        top=model,
        base=base,
        text=base.language_model,
        layers=base.language_model.layers,
        has_images=has_images,
        visual_tokens=visual_tokens,
    )


FAMILIES = {
    "llava": Family(
        architectures=("LlavaForConditionalGeneration",),
        text_models=("llama", "mistral", "qwen2"),
        parts=_llava_parts,
    ),
}


def parts_of(model: nn.Module) -> ModelParts:
    """The parts of a supported model. Raises NotImplementedError with what is supported."""
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps the module
    names = {cls.__name__ for cls in type(model).__mro__}
    for name, family in FAMILIES.items():
        if names.intersection(family.architectures):
            parts = family.parts(model, name)
            _check_text_model(parts, family)
            return parts
    raise NotImplementedError(
        f"{type(model).__name__} is not supported. Supported are: {_supported()}"
    )


def _check_text_model(parts: ModelParts, family: Family) -> None:
    config = parts.text.config
    if config.model_type not in family.text_models:
        raise NotImplementedError(
            f"{type(parts.top).__name__} with a {config.model_type!r} text model is not "
            f"supported. Supported are: {_supported()}"
        )
    sliding = [kind for kind in getattr(config, "layer_types", None) or () if "sliding" in kind]
    if sliding or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        raise NotImplementedError(
            "a text model with sliding-window attention is not supported: its window counts rows, "
            "and rows that leave would move it"
        )
    if getattr(parts.top, "_tp_size", None) not in (None, 1):
        raise NotImplementedError(
            "a tensor-parallel model is not supported: each rank sees some of the heads only, and "
            "would keep tokens of its own choice"
        )


def _supported() -> str:
    return "; ".join(
        f"{name}: {', '.join(family.architectures)} with text models "
        f"{', '.join(family.text_models)}"
        for name, family in FAMILIES.items()
    )
