"""A small LLaVA-OneVision with random weights, and sizes of pictures that make up to 16 crops."""

import torch
from safetensors.torch import load_file, save_file
from tiny_next import IMAGE, TEXT, new_tokenizer, with_weights
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.video_processing_llava_onevision import (
    LlavaOnevisionVideoProcessor,
)

PLACEHOLDER = "<image>"
FAMILY, ARCHITECTURE = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
EDGE, PATCHES, VIDEO = 56, 16, 98
GRIDS = [[56, 112], [112, 56], [112, 112], [224, 224]]
SIZES = [(224, 183), (112, 100), (30, 100), (57, 111)]  # width, height; the first is scaled down
SIDE = {"height": EDGE, "width": EDGE}


def new_model():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(**TEXT)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=GRIDS,
    )
    model = with_weights(LlavaOnevisionForConditionalGeneration(config))
    with torch.no_grad():
        model.model.image_newline.normal_(0, 0.5)
    return model


def new_processor():
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=GRIDS),
        new_tokenizer("<video>"),
        LlavaOnevisionVideoProcessor(size=SIDE),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
    )


def save(model, folder):
    """With the names that vLLM alone knows of the tower's weights."""
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
