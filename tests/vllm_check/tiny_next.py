"""A small LLaVA-NeXT with random weights, and pictures of noise."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

IMAGE, EDGE, PATCHES = 99, 56, 16
GRIDS = [[56, 112], [112, 56], [112, 112]]
SIZES = [(112, 112), (100, 40), (30, 100), (57, 111)]  # width, height
MOST = 88  # of 112 x 112: the whole, four crops, and eight lines that end
BEST = 20  # next tokens whose probabilities are compared: other rows would change them all


TEXT = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@torch.no_grad()
def with_weights(model):
    """Drawn as large as makes a difference to what is said."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.12)
    return model.eval()


def new_model():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(**TEXT)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
        image_seq_length=PATCHES,
    )
    model = with_weights(LlavaNextForConditionalGeneration(config))
    with torch.no_grad():
        model.model.image_newline.normal_(0, 0.5)
    return model


def new_tokenizer(*more, **named):
    """Numbers are words, as is `<image>`; so are `more`, the last numbers before it. What the
    processor calls some of them is `named`."""
    words = [str(i) for i in range(IMAGE - len(more))] + [*more, "<image>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="0",
        bos_token="1",
        eos_token="2",
        unk_token="0",
        additional_special_tokens=[*more, "<image>"],
        **({"extra_special_tokens": named} if named else {}),
    )


def new_processor():
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": EDGE},
            crop_size={"height": EDGE, "width": EDGE},
            image_grid_pinpoints=GRIDS,
        ),
        tokenizer=new_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def save(model, folder):
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)
    return folder


def drawing(size, seed):
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
