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


def _deepseek_hybrid(config: Any, seen: Features) -> int:
    """A second tower, and a neck once more; both are scaled to four times the patches of the first,
    and two convolutions bring each down to these."""
    larger, out = config.high_res_vision_config, config.text_config.hidden_size
    second = features(larger, larger.model_type, None)
    channels, tokens = second.channels, seen.rows * seen.columns
    neck = second.rows * second.columns * channels * (larger.hidden_size + 9 * channels)
    down = 4 * tokens * 9 * channels * 2 * channels + tokens * 9 * 2 * channels * 4 * channels
    aligner = tokens * (out // 2 * (seen.channels + 4 * channels) + out * out)
    return second.macs + neck + 2 * down + aligner


def _idefics2(config: Any, seen: Features) -> int:
    """A gated MLP of all patches, and layers of latents that attend to these and to each other."""
    perceiver, text = config.perceiver_config, config.text_config
    patches, width, latents = (
        seen.rows * seen.columns,
        perceiver.hidden_size,
        perceiver.resampler_n_latents,
    )
    projection = patches * text.intermediate_size * (2 * seen.channels + text.hidden_size)
    queries = perceiver.resampler_n_heads * perceiver.resampler_head_dim
    keys = perceiver.num_key_value_heads * perceiver.resampler_head_dim
    everything = patches + latents
    layer = 2 * latents * width * queries + 2 * everything * width * keys
    layer += 2 * latents * everything * queries + latents * 12 * width**2
    return projection + perceiver.resampler_depth * layer


def _aria(config: Any, seen: Features) -> int:
    """Queries attend to all patches, behind two projections each."""
    patches, width, out = seen.rows * seen.columns, seen.channels, config.text_config.hidden_size
    tokens = {int(k): v for k, v in config.projector_patch_to_query_dict.items()}.get(patches)
    if tokens is None:
        raise ValueError(
            f"images: {patches} patches, and projector_patch_to_query_dict has "
            f"{sorted(map(int, config.projector_patch_to_query_dict))}"
        )
    attending = (4 * tokens + 4 * patches) * width**2 + 2 * tokens * patches * width
    return attending + tokens * out * (width + out)


def _granite_docling(config: Any, seen: Features) -> int:
    """Squares of patches become a token, once more for each layer whose features come between
    those of the decoder; and the patches vote for the size of squares. By the coarse way."""
    vision = config.vision_config
    square, out, patches = vision.scale_factor**2, vision.out_hidden_size, seen.rows * seen.columns
    merging = patches * seen.channels * out + patches // square * out**2
    votes = patches * seen.channels if config.density_router_hidden_size is not None else 0
    return (1 + len(vision.deepstack_visual_indexes)) * merging + votes


def _granite4_vision(config: Any, seen: Features) -> int:
    """Queries of a window attend to each other, and to its patches; once for each layer that gets
    them."""
    former, width = config.qformer_config, seen.channels
    query_side, side = map(int, config.downsample_rate.split("/"))
    windows = (seen.rows // side) * (seen.columns // side)
    queries, patches = query_side**2, side**2
    mlp = 2 * width * former.intermediate_size
    itself = queries * (4 * width**2 + mlp) + 2 * queries**2 * width
    across = 2 * width**2 * (queries + patches) + 2 * queries * patches * width
    layers = former.num_hidden_layers
    crossing = -(-layers // former.cross_attention_frequency)
    out = queries * width * config.text_config.hidden_size
    times = len(config.deepstack_layer_map) + len(config.spatial_target_layers)
    return times * windows * (layers * itself + crossing * across + out)


def _video_llama_3(config: Any, seen: Features) -> int:
    """A token for each patch, as pictures have: those of videos are scaled down before."""
    return _two_layers(config, seen.rows * seen.columns, seen.channels)


def _ernie(config: Any, seen: Features) -> int:
    """Of a picture, which is taken for two frames."""
    vision = config.vision_config
    square = seen.channels * vision.spatial_merge_size**2
    frames = square * vision.temporal_merge_size
    row = square * (square + square + frames + square + config.text_config.hidden_size)
    return seen.rows * seen.columns * row


def _lfm2(config: Any, seen: Features) -> int:
    side, inner = config.downsample_factor, config.projector_hidden_size
    tokens = (seen.rows // side) * (seen.columns // side)
    return tokens * inner * (side**2 * seen.channels + config.text_config.hidden_size)


def _minicpm(config: Any, seen: Features) -> int:
    if config.downsample_mode == "4x":
        raise NotImplementedError(
            "images: FLOPs of a vision tower that merges no patches between its layers "
            "(downsample_mode='4x') are not known; count them elsewhere and pass images=0"
        )
    rows, width, macs = seen.rows * seen.columns, seen.channels, 0
    for left in reversed(range(config.merger_times)):
        rows //= 4
        macs += rows * 4 * width * (4 * width + (width if left else config.text_config.hidden_size))
    return macs


def _two_layers(config: Any, rows: int, width: int) -> int:
    out = config.text_config.hidden_size
    return rows * out * (width + out)


def _layers(config: Any) -> int:
    """From how many layers of the tower features come, one beside the other."""
    layers = getattr(config, "vision_feature_layers", None)  # ViP-LLaVA's name, before 5.23
    layers = getattr(config, "vision_feature_layer", -1) if layers is None else layers
    return 1 if isinstance(layers, int) else len(layers)


PROJECTORS: dict[str, Callable[[Any, Features], int]] = {
    "aria": _aria,
    "aya_vision": _cohere,
    "cohere2_vision": _cohere,
    "cosmos3_edge": _cosmos3_edge,
    "deepseek_vl": _deepseek,
    "deepseek_vl_hybrid": _deepseek_hybrid,
    "ernie4_5_vl_moe": _ernie,
    "exaone4_5": _nothing,
    "gemma3": _gemma3,
    "glm46v": _nothing,
    "glm4v": _nothing,
    "glm4v_moe": _nothing,
    "glm_ocr": _nothing,
    "got_ocr2": _got_ocr2,
    "granite4_vision": _granite4_vision,
    "granite_docling": _granite_docling,
    "hyperclovax_vision_v2": _one_layer,
    "idefics2": _idefics2,
    "idefics3": _one_layer,
    "internvl": _internvl,
    "janus": _janus,
    "lfm2_vl": _lfm2,
    "lighton_ocr": _mistral3,
    "llava": _llava,
    "llava_next": _llava,
    "llava_next_video": _llava,
    "llava_onevision": _llava,
    "minicpm_ocr": _minicpm,
    "minicpmv4_6": _minicpm,
    "minicpmv4_7": _minicpm,
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
    "video_llama_3": _video_llama_3,
    "video_llava": _llava,
    "vipllava": _vipllava,
}
"""{model_type: multiply-accumulates between the tower and the language model, of a picture}"""
