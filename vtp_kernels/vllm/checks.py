"""Whether a model's images can be pruned by what its vision tower sees. Nothing of vLLM is needed
to tell."""

from __future__ import annotations

from typing import Any

from .budget import KEY, Budget

__all__ = [
    "check_clip",
    "check_grids",
    "check_grids_engine",
    "check_intern",
    "check_ranks",
    "check_siglip",
]


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


def check_grids(budget: Budget, config: Any, mm_config: Any) -> None:
    """Whether a Qwen-VL or one like it can be pruned so, with vLLM's settings for its images and
    videos.

    Raises
    ------
    NotImplementedError
        If vLLM prunes videos: its function gives what follows a video, and images beside it, other
        positions than whole prompts have. If the attention to score by is a window's, or is that of
        a tower which no rank sees as a whole.
    """
    if mm_config.video_pruning_rate:
        raise NotImplementedError(
            f"{KEY}: images keep no exact positions beside vLLM's pruning of videos; expected no "
            f"video_pruning_rate, got {mm_config.video_pruning_rate}"
        )
    check_ranks(budget, mm_config, "all images")
    vision = config.vision_config
    full = getattr(vision, "fullatt_block_indexes", None)
    if budget.score == "attention" and full is not None and vision.depth - 1 not in full:
        raise NotImplementedError(
            f"{KEY}.score: the last block of the tower attends in windows; expected "
            "'similarity' or 'divprune', got 'attention'"
        )


def check_grids_engine(config: Any) -> None:
    """Whether vLLM with this configuration (VllmConfig) gives a Qwen-VL, or one like it, what
    budgets need, be there one from the start or in requests.

    Raises
    ------
    NotImplementedError
        If it is another model runner, a part of a pipeline, or its tower is compiled.
    """
    if not config.use_v2_model_runner:
        raise NotImplementedError(
            f"{KEY}: positions of images with a budget need vLLM's model runner V2; set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise NotImplementedError(
            "pipeline_parallel_size: expected 1 with the plugin, for only the first part of a "
            "model sees which rows of an image stay, and all of them need the positions"
        )
    if config.compilation_config.compile_mm_encoder:
        raise NotImplementedError(
            "compile_mm_encoder: expected False with the plugin, which looks into the tower"
        )


def check_ranks(budget: Budget, mm_config: Any, what: str) -> None:
    """Raise NotImplementedError where attention is to be scored by, and images are shared out to
    ranks, so that none of them sees `what`."""
    if budget.score == "attention" and mm_config.mm_encoder_tp_mode == "data":
        raise NotImplementedError(
            f"{KEY}.score: with mm_encoder_tp_mode='data' no rank sees {what}; expected "
            "'similarity' or 'divprune', got 'attention'"
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
