"""Small LLaVA models with random weights, and prompts for them."""

import inspect

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vtp_kernels.models.families.tiny import TEXT

IMAGE = 99
PATCHES = 16  # visual tokens per image
DEPTH = 6
# Newer versions of transformers encode the pictures of generate() before they call the model. Older
# ones (5.17) hand beams the wrong pictures where a prompt has more than one, and lose those of a
# prompt prefilled in chunks; that is so with and without pruning.
ENCODES_FIRST = (
    "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
)


def tiny_llava(attention="sdpa", *, dtype=torch.float32, text="llama", seed=0, **settings):
    """6 decoder layers of 4 query and 2 key heads; weights wide enough that attention is uneven."""
    torch.manual_seed(seed)
    if text == "mistral":
        settings = {"sliding_window": None} | settings
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=32,
        ),
        text_config=AutoConfig.for_model(text, **TEXT | settings),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None  # every case runs to its full length
    model.generation_config.pad_token_id = 0
    return model


def prompt(images, text, seed):
    """Token ids: <bos>, some text, then per image its placeholders and a word, then `text` words.

    Ids of words leave out those that mean something.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, 98, (n,), generator=generator)

    parts = [torch.tensor([1]), words(3)]
    for _ in range(images):
        parts += [torch.full((PATCHES,), IMAGE), words(2)]
    return torch.cat([*parts, words(text)])


def batch(*prompts, seed=1):
    """Left-padded inputs, with pictures for all placeholders."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pictures = int((ids == IMAGE).sum()) // PATCHES
    if pictures:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(pictures, 3, 56, 56, generator=generator)
    return inputs


def one():
    return batch(prompt(1, 7, seed=0))


def three():
    """Three prompts of different lengths, with one, two and three images, and one with none."""
    return batch(prompt(1, 9, 0), prompt(2, 3, 1), prompt(3, 6, 2), prompt(0, 5, 3))


BATCHES = {"one": one, "padded": three}
