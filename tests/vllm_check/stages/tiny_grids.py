"""Small models with random weights that see images of any size and have M-RoPE, by family."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny_next import IMAGE, new_tokenizer, with_weights
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

QWEN_WORDS = {"vision_start": 96, "vision_end": 97, "video": 98}
GLM_WORDS = {
    "video_start": 94,
    "video_end": 95,
    "image_start": 96,
    "image_end": 97,
    "video": 98,
}
#: As transformers' processors spell them.
SPELLED = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
    "video": "<|video|>",
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    },
}
VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}

BEFORE_AND_AFTER = ("vision_start", "vision_end", "image_start", "image_end")
# What real configurations say; vLLM asks, and transformers takes it for granted.
PLANES_TEXT = {
    "head_dim": 32,
    "rope_parameters": TEXT["rope_parameters"] | {"mrope_interleaved": True},
}
PLANES = VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}


@dataclass(frozen=True)
class Tiny:
    """What `plain_tiles` asks of a module. Parts of the names of transformers' classes, and of what
    the configuration has; words: what has a number of its own besides the image."""

    model: str
    processor: str
    video: str
    vision: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=lambda: QWEN_WORDS)
    pictures: Any = Qwen2VLImageProcessorPil
    SIZES = (140, 84), (112, 240), (168, 168), (60, 100)  # width, height

    @property
    def ARCHITECTURE(self):
        return f"{self.model}ForConditionalGeneration"

    @property
    def PLACEHOLDER(self):
        start, end = (name for name in self.words if name in BEFORE_AND_AFTER)
        return f"{SPELLED[start]} <image> {SPELLED[end]}"

    def new_model(self):
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.model}Config")(
            vision_config=self.vision,
            text_config=TEXT | self.text,
            tie_word_embeddings=False,
            image_token_id=IMAGE,
            **{f"{name}_token_id": number for name, number in self.words.items()},
        )
        return with_weights(getattr(transformers, self.ARCHITECTURE)(config))

    def new_processor(self):
        named = {f"{name}_token": SPELLED[name] for name in self.words}
        return getattr(transformers, f"{self.processor}Processor")(
            image_processor=self.pictures(
                size={"shortest_edge": 56 * 56, "longest_edge": 2 * 280 * 280}
            ),
            tokenizer=new_tokenizer(*named.values(), image_token="<image>", **named),
            video_processor=getattr(transformers, f"{self.video}VideoProcessor")(
                size={"shortest_edge": 56 * 56, "longest_edge": 8 * 56 * 56}
            ),
            chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        )


GLM = "Glm4v", "Glm4v", VISION | {"image_size": 112}
GLM_TEXT = {
    "head_dim": 32,
    "rope_parameters": TEXT["rope_parameters"] | {"partial_rotary_factor": 1.0},
}

# Those with experts first: vLLM makes what these need with the first engine of a process only.
FAMILIES = {
    "glm4v_moe": Tiny(
        "Glm4vMoe",
        *GLM,
        GLM_TEXT
        | EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "use_qk_norm": False},
        GLM_WORDS,
        Glm4vImageProcessorPil,
    ),
    "qwen3_vl_moe": Tiny(
        *("Qwen3VLMoe", "Qwen3VL", "Qwen3VL", PLANES),
        PLANES_TEXT | EXPERTS | {"norm_topk_prob": True},
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2_5_VL",
        "Qwen2_5_VL",
        "Qwen2VL",
        VISION | {"window_size": 112, "fullatt_block_indexes": [2], "tokens_per_second": 2},
    ),
    "qwen2_vl": Tiny(
        "Qwen2VL",
        "Qwen2VL",
        "Qwen2VL",
        {
            "depth": 3,
            "embed_dim": 64,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    ),
    "qwen3_vl": Tiny("Qwen3VL", "Qwen3VL", "Qwen3VL", PLANES, PLANES_TEXT),
    "glm4v": Tiny("Glm4v", *GLM, GLM_TEXT, GLM_WORDS, Glm4vImageProcessorPil),
}
