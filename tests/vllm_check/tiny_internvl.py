"""A small InternVL with random weights, and sizes of pictures that make several tiles."""

import torch
from tiny_next import IMAGE, TEXT, new_tokenizer, with_weights
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

PLACEHOLDER = "<image>"
FAMILY, ARCHITECTURE = "internvl", "InternVLForConditionalGeneration"
SIZES = [(112, 112), (112, 50), (40, 120), (50, 50)]  # width, height
MOST = 5 * 16
SIDE = {"height": 112, "width": 112}


def new_model():
    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=112,
        patch_size=14,
    )
    text = Qwen2Config(**TEXT)
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16
    )
    return with_weights(InternVLForConditionalGeneration(config))


def new_processor():
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4),
        new_tokenizer(
            "<img>",
            "</img>",
            "<video>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<image>",
            video_token="<video>",
        ),
        InternVLVideoProcessor(size=SIDE),
        image_seq_length=16,
    )


def save(model, folder):
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)
