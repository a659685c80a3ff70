"""Decoder layers of language models: a line in TEXT for each type of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["CHUNK", "TEXT", "DecoderLayer", "decoder_layers", "head_dim"]

CHUNK = 64
"""Rows that the gated delta rule takes together, here and in the kernels for it."""


class DecoderLayer(NamedTuple):
    """Multiply-accumulates of one layer.

    `projections` and `mlp` for each row; `pair` for each row with each key, once for their logit
    and once for the value; `chunk` for each CHUNK rows begun, in layers of linear attention, which
    have no pairs. A row sees at most `window` keys. `visual_mlp`: of visual rows, where these go
    through others than text does.
    """

    projections: int
    mlp: int
    pair: int = 0
    chunk: int = 0
    window: int | None = None
    visual_mlp: int | None = None


def decoder_layers(text: Any) -> list[DecoderLayer]:
    """Every layer of a text configuration. NotImplementedError where its type is not known."""
    kind = text.model_type
    if kind not in TEXT:
        raise NotImplementedError(
            f"FLOPs of a {kind!r} language model are not known: what its layers multiply was not "
            "looked at (vtp_kernels.flop_counts.text)"
        )
    mlp = TEXT[kind]
    layers = []
    for layer in range(text.num_hidden_layers):
        name = _layer_type(text, layer)
        if name == "linear_attention" and kind in QWEN3_5:
            layers.append(_delta_net(text, mlp(text, layer)))
        elif name == "conv" and kind == "lfm2":
            layers.append(_short_convolution(text, mlp(text, layer)))
        elif name in (None, "full_attention", "sliding_attention"):
            attention = _attention(text, mlp(text, layer), name)
            if kind in VISUAL_MLP:
                attention = attention._replace(visual_mlp=VISUAL_MLP[kind](text, layer))
            layers.append(attention)
        else:
            raise NotImplementedError(
                f"FLOPs of a {kind!r} language model are not known: its layer {layer} is a "
                f"{name!r}, which was not looked at (vtp_kernels.flop_counts.text)"
            )
    return layers


def _layer_type(text: Any, layer: int) -> str | None:
    kinds = getattr(text, "layer_types", None)
    return kinds[layer] if kinds else None


# ---- attention ------------------------------------------------------------------------------


def head_dim(text: Any) -> int:
    """Elements of a head, of a language model's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _attention(text: Any, mlp: int, kind: str | None) -> DecoderLayer:
    width = text.hidden_size
    query_width = text.num_attention_heads * head_dim(text)
    key_width = text.num_key_value_heads * head_dim(text)
    gate = query_width if text.model_type in QWEN3_5 else 0
    slides = kind == "sliding_attention" or (kind is None and text.model_type in ALL_SLIDING)
    return DecoderLayer(
        projections=width * (2 * query_width + 2 * key_width + gate),
        mlp=mlp,
        pair=query_width,
        window=text.sliding_window if slides else None,
    )


def _delta_net(text: Any, mlp: int) -> DecoderLayer:
    """A gated delta net: projections and a short convolution for each row, and the recurrence by
    chunks. Of that the matrix products count: of keys and of queries with keys, of both with the
    state, and what comes out. Two triangular systems are solved besides, which do not count: less
    than 1 % of a model in use."""
    heads, head_key, head_value = (
        text.linear_num_value_heads,
        text.linear_key_head_dim,
        text.linear_value_head_dim,
    )
    keys, values = text.linear_num_key_heads * head_key, heads * head_value
    convolution = (2 * keys + values) * text.linear_conv_kernel_dim
    into = 2 * keys + 2 * values + 2 * heads
    within = CHUNK * CHUNK * (2 * head_key + head_value)
    with_state = 3 * CHUNK * head_key * head_value
    return DecoderLayer(
        projections=text.hidden_size * (into + values) + convolution,
        mlp=mlp,
        chunk=heads * (within + with_state),
    )


def _short_convolution(text: Any, mlp: int) -> DecoderLayer:
    """Of three parts of what a row is projected to, one goes through a convolution of each channel,
    and the others are gates. It has no pairs."""
    width = text.hidden_size
    return DecoderLayer(projections=width * (4 * width + text.conv_L_cache), mlp=mlp)


# ---- MLP ------------------------------------------------------------------------------------


def _gated(text: Any, layer: int) -> int:
    return 3 * text.hidden_size * text.intermediate_size


def _plain(text: Any, layer: int) -> int:
    return 2 * text.hidden_size * text.intermediate_size


def _mixtral(text: Any, layer: int) -> int:
    router = text.hidden_size * text.num_local_experts
    return router + text.num_experts_per_tok * _gated(text, layer)


def _qwen_experts(text: Any, layer: int) -> int:
    """A router and the experts that it names, in all layers or some."""
    if not _is_sparse(text, layer):
        return _gated(text, layer)
    inner = text.num_experts_per_tok * text.moe_intermediate_size
    return text.hidden_size * (text.num_experts + 3 * inner)


def _qwen_shared_expert(text: Any, layer: int) -> int:
    """Beside those, one for all rows, with a gate."""
    shared = text.hidden_size * (3 * text.shared_expert_intermediate_size + 1)
    return _qwen_experts(text, layer) + (shared if _is_sparse(text, layer) else 0)


def _is_sparse(text: Any, layer: int) -> bool:
    step = getattr(text, "decoder_sparse_step", 1)
    return layer not in (getattr(text, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0


def _glm_experts(text: Any, layer: int) -> int:
    """Experts of all rows beside the chosen ones; the first layers have none."""
    if layer < text.first_k_dense_replace:
        return _gated(text, layer)
    experts = text.num_experts_per_tok + text.n_shared_experts
    return text.hidden_size * (text.n_routed_experts + 3 * experts * text.moe_intermediate_size)


def _lfm2(text: Any, layer: int) -> int:
    """Gated, of a width that is rounded up."""
    inner = text.intermediate_size
    if text.block_auto_adjust_ff_dim:
        inner = int(2 * inner / 3)
        if text.block_ffn_dim_multiplier is not None:
            inner = int(text.block_ffn_dim_multiplier * inner)
            inner = -(-inner // text.block_multiple_of) * text.block_multiple_of
    return 3 * text.hidden_size * inner


def _ernie_text(text: Any, layer: int) -> int:
    return _ernie(text, layer, text.moe_intermediate_size[0])


def _ernie_visual(text: Any, layer: int) -> int:
    return _ernie(text, layer, text.moe_intermediate_size[1])


def _ernie(text: Any, layer: int, inner: int) -> int:
    """Text and visual rows have experts of their own, and those of all rows besides; the first
    layers have none."""
    if text.mlp_layer_types[layer] != "sparse":
        return _gated(text, layer)
    shared = text.moe_intermediate_size[0] * text.moe_num_shared_experts
    return text.hidden_size * (text.moe_num_experts + 3 * (text.moe_k * inner + shared))


def _aria(text: Any, layer: int) -> int:
    """Experts of all rows beside the chosen ones, all of one size."""
    experts = text.moe_topk + text.moe_num_shared_experts
    return text.hidden_size * text.moe_num_experts + experts * _gated(text, layer)


ALL_SLIDING = ("ministral3", "mistral", "mixtral", "qwen3_moe", "starcoder2")
"""Model types that do not name the kinds of their layers: all slide where there is a window."""

QWEN3_5 = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Model types with gated delta nets, and with a gate on what the other layers' attention puts out,
which the query's projection makes."""

VISUAL_MLP: dict[str, Callable[[Any, int], int]] = {"ernie4_5_vl_moe_text": _ernie_visual}
"""As TEXT, of visual rows, where these have an MLP of their own."""

TEXT: dict[str, Callable[[Any, int], int]] = {
    **dict.fromkeys(
        (
            "cohere",
            "cohere2",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm",
            "glm4",
            "glm4v_text",
            "glm_ocr_text",
            "granite",
            "granite4_vision_text",
            "granite_docling_text",
            "hyperclovax",
            "llama",
            "ministral",
            "ministral3",
            "mistral",
            "paddleocr_vl_text",
            "qwen2",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
            "qwen3",
            "qwen3_5_text",
            "qwen3_vl_text",
            "seed_oss",
        ),
        _gated,
    ),
    **dict.fromkeys(("apertus", "cosmos3_edge_text", "starcoder2"), _plain),
    "aria_text": _aria,
    "ernie4_5_vl_moe_text": _ernie_text,
    "lfm2": _lfm2,
    **dict.fromkeys(("gpt_oss", "mixtral"), _mixtral),
    **dict.fromkeys(("qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text"), _qwen_experts),
    **dict.fromkeys(("qwen2_moe", "qwen3_5_moe_text", "qwen3_next"), _qwen_shared_expert),
    **dict.fromkeys(("glm4_moe", "glm4v_moe_text"), _glm_experts),
}
"""{model_type: multiply-accumulates of a row in the MLP of a layer}; the attention is Llama's, or
what `layer_types` says."""
