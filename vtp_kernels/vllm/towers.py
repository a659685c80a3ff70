"""What an image is scored by, and of which vision towers that can be told."""

from __future__ import annotations

from typing import Any

from .budget import KEY, Budget

__all__ = ["check_clip"]


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
