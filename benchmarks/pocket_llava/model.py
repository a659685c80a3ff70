"""Architecture and processor of the pocket LLaVA: a standard HF LLaVA, 6.5 M parameters."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import scenes

TOKEN = {word: index for index, word in enumerate(scenes.VOCABULARY)}
TRAINED = Path(__file__).parent / "trained"
DECIDERS = Path(__file__).parent / "deciders"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def config() -> LlavaConfig:
    """256 visual tokens; CLIP of 6 x 128, read at its last but one layer; Llama of 8 x 256."""
    special = {
        "pad_token_id": TOKEN["<pad>"],
        "bos_token_id": TOKEN["<s>"],
        "eos_token_id": TOKEN["</s>"],
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=2,
            image_size=scenes.IMAGE_SIZE,
            patch_size=scenes.PATCH_SIZE,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=len(TOKEN),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            **special,
        ),
        image_token_index=TOKEN["<image>"],
        image_seq_length=scenes.GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **special,
    )


def new_model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(config())


def processor() -> LlavaProcessor:
    """One word, one token; case and punctuation are ignored."""
    tokenizer = Tokenizer(WordLevel(TOKEN, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[?.,!:;]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", TOKEN["<s>"])]
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": scenes.IMAGE_SIZE},
            crop_size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            padding_side="left",
        ),
        patch_size=scenes.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def pixels(images) -> torch.Tensor:
    """uint8 [224, 224, 3] arrays -> float32 [B, 3, 224, 224] in [-1, 1], as the processor does."""
    return (
        torch.stack([torch.from_numpy(i) for i in images]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    )
