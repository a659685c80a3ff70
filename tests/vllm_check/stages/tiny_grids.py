"""Small models with random weights whose images lie in grids, in transformers' form."""

import torch
import transformers
from tiny_next import IMAGE, new_tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

START, END, VIDEO = 96, 97, 98
PICTURE = "<start> <image> <end>"
SIZES = [(100, 60), (56, 120), (84, 84), (70, 112), (20, 400)]  # width, height
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
WINDOWED = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "window_size": 56,
    "fullatt_block_indexes": [2],
}
DEEPSTACK = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": WINDOWED,
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": DEEPSTACK,
}
NAMES = {  # experts first: vLLM makes the groups of its ranks once in a process
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
}


def new_model(family):
    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": ROPE}
    if family.startswith("qwen3"):
        text |= {"head_dim": 32, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    if family.endswith("moe"):
        text |= EXPERTS
    name = NAMES[family]
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION[family], text_config=text, **TOKENS
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    return model


def new_processor(family):
    third = family.startswith("qwen3")
    name = {"qwen3_vl_moe": "Qwen3VL"}.get(family, NAMES[family])
    tokenizer = new_tokenizer(
        *("<start>", "<end>", "<video>"),
        image_token="<image>",
        video_token="<video>",
        vision_bos_token="<start>",
        vision_eos_token="<end>",
    )
    return getattr(transformers, f"{name}Processor")(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=168 * 168),
        tokenizer=tokenizer,
        video_processor=(Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor)(
            size={"shortest_edge": 56 * 56, "longest_edge": 8 * 56 * 56}
        ),
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
