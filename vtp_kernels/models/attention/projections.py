"""What a Llama-like attention module does in its forward, step by step and outside of it."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modules.placement import out_features

__all__ = [
    "NORMS",
    "attend",
    "has_sinks",
    "has_these_steps",
    "is_gated",
    "is_rotated",
    "out_name",
    "project",
    "project_all",
    "put_out",
    "refuse_sinks",
    "rotate",
    "takes_positions",
]

# Some (Qwen3, LFM2) normalise each head's queries and keys.
NORMS = {"q_proj": ("q_norm", "q_layernorm"), "k_proj": ("k_norm", "k_layernorm")}


def has_these_steps(attention: nn.Module) -> bool:
    """Whether these are the steps of a module: one around it, of an adapter, has others."""
    return hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")


def is_gated(attention: nn.Module) -> bool:
    """Whether q_proj gives, behind the query of each head, a gate for what the head attends to, as
    in Qwen3.5: it is twice as wide then."""
    features = out_features(attention.q_proj)
    return features == 2 * attention.config.num_attention_heads * attention.head_dim


def has_sinks(attention: nn.Module) -> bool:
    """Whether each head has a number of its own beside a row's logits in the softmax, as in
    gpt-oss: what it gets of a row's attention goes to no key."""
    return getattr(attention, "sinks", None) is not None


def refuse_sinks(attention: nn.Module, what: str) -> None:
    """Raise NotImplementedError for an attention module with sinks. `what` wants its weights."""
    if has_sinks(attention):
        raise NotImplementedError(
            f"{what}: the softmax of layer {attention.layer_idx} has attention sinks, and a row's "
            "weights there do not add up to 1, which only the model's own attention knows; use a "
            "method that goes by something else than the attention of layers"
        )


def project(attention: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """[B, H, S, D]: the queries ("q_proj"), keys or values of rows hidden [B, S, C]."""
    return _project(attention, name, hidden)[0]


def project_all(
    attention: nn.Module, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values, and the gate of what the queries attend to: [B, S, H * D]."""
    (query, gate), (key, _), (value, _) = (
        _project(attention, name, hidden) for name in ("q_proj", "k_proj", "v_proj")
    )
    return query, key, value, gate


def _project(attention: nn.Module, name: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    states, gate = getattr(attention, name)(hidden), None
    states = states.view(*states.shape[:2], -1, attention.head_dim)
    if name == "q_proj" and is_gated(attention):
        states, gate = states[:, :, 0::2], states[:, :, 1::2].flatten(2)
    norm = next((getattr(attention, x) for x in NORMS.get(name, ()) if hasattr(attention, x)), None)
    return (states if norm is None else norm(states)).transpose(1, 2), gate


def rotate(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys with their rotary position embedding. `positions` [B, S] or [1, S], those of
    the queries, are for an attention that `takes_positions`; others may get None."""
    # The functions that the layer itself uses stand beside it in its module.
    beside = sys.modules[type(attention).__module__]
    if is_rotated(attention):
        query, key = beside.apply_rotary_pos_emb(query, key, cos, sin)
    if takes_positions(attention):
        rope = attention.config.rope_parameters
        beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        scale = beside.get_llama_4_attn_scale(positions, beta, length)
        query = query * scale.to(query.dtype)
    return query, key


def takes_positions(attention: nn.Module) -> bool:
    """Whether an attention (Ministral 3) makes queries longer the later they come, and so is to be
    told their positions."""
    return hasattr(sys.modules[type(attention).__module__], "get_llama_4_attn_scale")


def is_rotated(attention: nn.Module) -> bool:
    """Whether a layer has positions: those of Cohere 2 and EXAONE 4 that see all rows have none, if
    the others see a window."""
    names = {cls.__name__ for cls in type(attention).__mro__}
    if "Cohere2Attention" in names:
        return attention.sliding_window is not None
    if "Exaone4Attention" in names:
        return attention.sliding_window is None or attention.is_sliding
    return True


def attend(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Tensor:
    """What the module attends to, by its own implementation of attention: [B, S, H * D], before
    the output projection. `given` are the other arguments of its forward."""
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    kind = attention.config._attn_implementation
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)
    scale = attention.scaling
    if has_sinks(attention):
        given["s_aux"] = attention.sinks
    output, _ = implementation(attention, query, key, value, mask, scaling=scale, **given)
    return output.flatten(2)


def put_out(attention: nn.Module, attended: Tensor, gate: Tensor | None) -> Tensor:
    """What the module puts out [B, S, C], given what its rows attend to, [B, S, H * D], and the
    gate of that."""
    if gate is not None:
        attended = attended * gate.sigmoid()
    return getattr(attention, out_name(attention))(attended)


def out_name(attention: nn.Module) -> str:
    """What a module calls its output projection."""
    return "o_proj" if hasattr(attention, "o_proj") else "out_proj"
