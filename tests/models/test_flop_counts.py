"""Every formula for FLOPs against what torch counts on a small model."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel

import vtp_kernels as vtp
from vtp_kernels.flop_counts.text import TEXT


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# ---- language models --------------------------------------------------------------------------

# Settings of all: those that a model does not have, it must not be counted with.
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
OWN = {
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm4v_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm_ocr_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_vl_moe_text": {"rope_parameters": MROPE},
    "qwen3_vl_text": {"rope_parameters": MROPE},
}
NOT_AUTO = {
    "paddleocr_vl_text": ("paddleocr_vl", "PaddleOCRTextModel"),
    "qwen2_5_omni_text": ("qwen2_5_omni", "Qwen2_5OmniThinkerTextModel"),
}


def language_model(kind, **settings):
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers has none")
    config = CONFIG_MAPPING[kind](**SIZES | OWN.get(kind, {}) | settings)
    make = AutoModel.from_config
    if kind in NOT_AUTO:
        folder, name = NOT_AUTO[kind]
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        make = getattr(module, name)._from_config
    model = make(config, attn_implementation="eager")  # torch counts no SDPA on a CPU
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("kind", TEXT)
def test_language_models(kind):
    model = language_model(kind)
    rows = torch.randn(1, 7, 64)
    torch_count = counted(lambda: model(inputs_embeds=rows, use_cache=False))
    tolerance = 0.01 if "qwen3_5" in kind else 0  # its convolution is padded
    assert vtp.flops(model, 7) == pytest.approx(torch_count, rel=tolerance)


def test_sliding_layers_see_their_window():
    """torch computes all pairs and masks them; a layer of a window needs no more than these."""
    narrow, wide = (
        language_model("cohere2", sliding_window=window, sliding_window_pattern=2)
        for window in (8, 64)
    )
    assert narrow.config.layer_types == ["sliding_attention", "full_attention"] * 2
    less = vtp.flops(wide, 40) - vtp.flops(narrow, 40)
    assert less == 2 * 2 * 2 * 64 * 40 * (40 - 8)  # 2 layers, logits and values


def test_chunks_of_linear_attention():
    """Rows are filled up to 64; longer prompts have more of them."""
    model = language_model("qwen3_5_text")
    for rows in (64, 65, 130):
        states = torch.randn(1, rows, 64)
        torch_count = counted(lambda states=states: model(inputs_embeds=states, use_cache=False))
        assert vtp.flops(model, rows) == pytest.approx(torch_count, rel=0.01)
