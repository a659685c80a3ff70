"""The small InternVL in the format that its checkpoints first had, which transformers does not read
by itself; vLLM has an image processor of its own for it."""

import json

import tiny_internvl
import torch
from safetensors.torch import save_file
from tiny_next import new_tokenizer
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config

PLACEHOLDER = "<image>"
FAMILY, ARCHITECTURE = "internvl", "InternVLChatModel"
SIZES = tiny_internvl.SIZES
CONTEXT = 98

NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_model."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("encoder.layer.", "encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_", ".ls"),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
)


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **more):
        self.vision_config = PreTrainedConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**more)


AutoConfig.register("internvl_chat", InternVLChatConfig)


def new_model():
    model = tiny_internvl.new_model()
    model.config.image_token_id = CONTEXT
    return model


def save(model, folder):
    """Its configuration, weights and tokenizer."""
    seen = model.config.vision_config
    settings = {
        "model_type": "internvl_chat",
        "architectures": [ARCHITECTURE],
        "vision_config": {
            "hidden_size": seen.hidden_size,
            "intermediate_size": seen.intermediate_size,
            "num_hidden_layers": seen.num_hidden_layers,
            "num_attention_heads": seen.num_attention_heads,
            "image_size": seen.image_size[0],
            "patch_size": seen.patch_size[0],
            "hidden_act": seen.hidden_act,
            "norm_type": seen.norm_type,
            "layer_norm_eps": seen.layer_norm_eps,
            "initializer_factor": 1.0,
            "qk_normalization": False,
            "qkv_bias": False,
        },
        "llm_config": model.config.text_config.to_dict(),
        "force_image_size": seen.image_size[0],
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 4,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(_weights(model.state_dict()), folder / "model.safetensors")
    new_tokenizer("<img>", "</img>", "<IMG_CONTEXT>").save_pretrained(folder)


def _weights(found):
    weights, apart = {}, {}
    for name, weight in found.items():
        for old, new in NAMES:
            name = name.replace(old, new)
        before, projection, after = name.partition(".attention.")
        if projection:
            apart[before, after] = weight
        else:
            weights[name] = weight.clone()  # some are tied
    for before, after in apart:
        if after.startswith("q_proj."):
            end = after.removeprefix("q_proj.")
            parts = [apart[before, f"{which}_proj.{end}"] for which in "qkv"]
            weights[f"{before}.attn.qkv.{end}"] = torch.cat(parts)
    return weights
