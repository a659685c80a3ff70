"""Whether a model's images can be pruned by what its vision tower sees. Nothing of vLLM is needed
to tell."""

from __future__ import annotations

from typing import Any

from .budget import KEY, Budget

__all__ = ["check_clip", "check_intern", "check_siglip"]


def check_clip(budget: Budget, config: Any) -> None:
    """Whether a LLaVA-1.5 or LLaVA-NeXT with this configuration can be pruned so.

    Raises
    ------
    NotImplementedError
        If its vision tower has no CLS token, or if its features come from several layers or with
        the CLS token among them.
    ValueError
        If no attention made its features, and it is to be scored by.
    """
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise NotImplementedError(
            f"{KEY}: the vision tower is a {tower!r}, which has no CLS token to choose by; "
            "expected a 'clip_vision_model'"
        )
    strategy = config.vision_feature_select_strategy
    if strategy != "default":
        raise NotImplementedError(
            f"{KEY}: expected vision_feature_select_strategy 'default', got {strategy!r}"
        )
    _check_layer(budget, config)


def check_siglip(budget: Budget, config: Any) -> None:
    """Whether a LLaVA-OneVision with this configuration can be pruned so. Raises as `check_clip`
    does."""
    tower = config.vision_config.model_type
    if tower != "siglip_vision_model":
        raise NotImplementedError(
            f"{KEY}: how a {tower!r} sees is not known here; expected a 'siglip_vision_model'"
        )
    strategy = config.vision_feature_select_strategy
    if strategy != "full":
        raise NotImplementedError(
            f"{KEY}: expected vision_feature_select_strategy 'full', got {strategy!r}"
        )
    _check_layer(budget, config)


def check_intern(budget: Budget, config: Any) -> None:
    """Whether an InternVL with this configuration can be pruned so: transformers' or the one that
    came with the checkpoints.

    Raises
    ------
    NotImplementedError
        If its features are not those of the last layer, which vLLM always takes, or come with CLS.
    """
    layer = getattr(config, "vision_feature_layer", -1)
    depth = config.vision_config.num_hidden_layers
    if layer not in (-1, depth):
        raise NotImplementedError(
            f"{KEY}: expected vision_feature_layer -1, the only one that vLLM takes, got {layer!r}"
        )
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if strategy != "default":
        raise NotImplementedError(
            f"{KEY}: expected vision_feature_select_strategy 'default', got {strategy!r}"
        )


def _check_layer(budget: Budget, config: Any) -> None:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise NotImplementedError(
            f"{KEY}: expected one vision_feature_layer to choose by, got {layer!r}"
        )
    if budget.score == "attention" and layer in (0, -1 - config.vision_config.num_hidden_layers):
        raise ValueError(
            f"{KEY}.score: the features are taken before the first layer, and no attention "
            "made them; use 'similarity'"
        )
