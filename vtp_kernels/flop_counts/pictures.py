"""A picture's way to the language model: the vision tower, then what is between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .towers import Features, Size, features

__all__ = ["PROJECTORS", "picture"]


def picture(config: Any, size: Size = None) -> int:
    """Multiply-accumulates of one picture, crop or tile of a model with that configuration.

    Raises NotImplementedError where its tower or what follows it is not known, or FLOPs depend on
    sizes and none is given; ValueError for sizes that its tower does not take.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise NotImplementedError(
            f"images: a {config.model_type!r} configuration has no vision tower; give the whole "
            "model's, or images=0"
        )
    # Some had no type of their own before transformers 5.23.
    kind = vision.model_type or f"{config.model_type}_vision"
    seen = features(vision, kind, size)
    if config.model_type not in PROJECTORS:
        raise NotImplementedError(
            f"images: FLOPs between the vision tower and the language model of a "
            f"{config.model_type!r} are not known; count them elsewhere and pass images=0"
        )
    return seen.macs + PROJECTORS[config.model_type](config, seen)


def _nothing(config: Any, seen: Features) -> int:
    """What the tower puts out are tokens."""
    return 0


def _one_layer(config: Any, seen: Features) -> int:
    return seen.rows * seen.columns * seen.channels * config.text_config.hidden_size


def _llava(config: Any, seen: Features) -> int:
    rows = seen.rows * seen.columns + seen.others
    rows -= config.vision_feature_select_strategy == "default"
    return _two_layers(config, rows, _layers(config) * seen.channels)


def _vipllava(config: Any, seen: Features) -> int:
    return _two_layers(config, seen.rows * seen.columns, _layers(config) * seen.channels)


def _deepseek(config: Any, seen: Features) -> int:
    return _two_layers(config, seen.rows * seen.columns, seen.channels)


def _janus(config: Any, seen: Features) -> int:
    vision = config.vision_config
    inner = vision.projection_dim
    return seen.rows * seen.columns * inner * (seen.channels + (vision.depth - 1) * inner)


def _internvl(config: Any, seen: Features) -> int:
    """Squares of patches become one token each."""
    square = int(1 / config.downsample_ratio) ** 2
    return _two_layers(config, seen.rows * seen.columns // square, square * seen.channels)


def _mistral3(config: Any, seen: Features) -> int:
    """The same, by a projection of its own."""
    merge = config.spatial_merge_size
    tokens = (seen.rows // merge) * (seen.columns // merge)
    merging = tokens * merge**2 * seen.channels**2
    return merging + _two_layers(config, tokens, _layers(config) * seen.channels)


def _gemma3(config: Any, seen: Features) -> int:
    """Means of squares are projected."""
    return config.mm_tokens_per_image * seen.channels * config.text_config.hidden_size


def _cohere(config: Any, seen: Features) -> int:
    """Squares of patches become one token each, by a gated MLP."""
    out = config.text_config.hidden_size
    inner = getattr(config, "alignment_intermediate_size", out)
    square = config.downsample_factor**2
    tokens = seen.rows * seen.columns // square
    return tokens * (square * seen.channels * inner + inner // 2 * out)


def _cosmos3_edge(config: Any, seen: Features) -> int:
    square, inner = config.vision_config.spatial_merge_size**2, config.projector_hidden_size
    out = config.text_config.hidden_size
    return seen.rows * seen.columns // square * inner * (square * seen.channels + out)


def _paddleocr(config: Any, seen: Features) -> int:
    square = config.vision_config.spatial_merge_size**2
    tokens, width = seen.rows * seen.columns // square, square * seen.channels
    return tokens * width * (width + config.text_config.hidden_size)


def _got_ocr2(config: Any, seen: Features) -> int:
    """Two convolutions of 3 x 3 that halve the sides, and a projection."""
    out, channels = config.text_config.hidden_size, seen.channels
    rows, columns = -(-seen.rows // 2), -(-seen.columns // 2)
    first = rows * columns * 9 * channels * 2 * channels
    tokens = -(-rows // 2) * -(-columns // 2)
    return first + tokens * out * (9 * 2 * channels + out)


def _two_layers(config: Any, rows: int, width: int) -> int:
    out = config.text_config.hidden_size
    return rows * out * (width + out)


def _layers(config: Any) -> int:
    """From how many layers of the tower features come, one beside the other."""
    layers = getattr(config, "vision_feature_layers", None)  # ViP-LLaVA's name, before 5.23
    layers = getattr(config, "vision_feature_layer", -1) if layers is None else layers
    return 1 if isinstance(layers, int) else len(layers)


PROJECTORS: dict[str, Callable[[Any, Features], int]] = {
    "aya_vision": _cohere,
    "cohere2_vision": _cohere,
    "cosmos3_edge": _cosmos3_edge,
    "deepseek_vl": _deepseek,
    "gemma3": _gemma3,
    "glm46v": _nothing,
    "glm4v": _nothing,
    "glm4v_moe": _nothing,
    "glm_ocr": _nothing,
    "got_ocr2": _got_ocr2,
    "hyperclovax_vision_v2": _one_layer,
    "idefics3": _one_layer,
    "internvl": _internvl,
    "janus": _janus,
    "lighton_ocr": _mistral3,
    "llava": _llava,
    "llava_next": _llava,
    "llava_next_video": _llava,
    "llava_onevision": _llava,
    "mistral3": _mistral3,
    "ovis2": _one_layer,
    "paddleocr_vl": _paddleocr,
    "paligemma": _one_layer,
    "qianfan_ocr": _internvl,
    "qwen2_5_omni_thinker": _nothing,
    "qwen2_5_vl": _nothing,
    "qwen2_vl": _nothing,
    "qwen3_5": _nothing,
    "qwen3_5_moe": _nothing,
    "qwen3_omni_moe_thinker": _nothing,
    "qwen3_vl": _nothing,
    "qwen3_vl_moe": _nothing,
    "smolvlm": _one_layer,
    "video_llava": _llava,
    "vipllava": _vipllava,
}
"""{model_type: multiply-accumulates between the tower and the language model, of a picture}"""
