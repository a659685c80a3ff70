"""A small model with random weights of every supported family, and prompts for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_llava import IMAGE
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

VIDEO = 98
TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def clip():
    return CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=32)


def siglip():
    return SiglipVisionConfig(**VISION, image_size=56, patch_size=14, vision_use_head=False)


def llava_next():
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=clip(),
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            image_seq_length=16,
        )
    )


def llava_onevision():
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=siglip(),
            text_config=Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
        )
    )


def internvl(text):
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(**VISION, image_size=112, patch_size=14),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=16,
        )
    )


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 64,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 96,
    "vision_end_token_id": 97,
}


def qwen2_5_vl():
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
            text_config=TEXT | {"rope_parameters": ROPE},
            **QWEN_TOKENS,
        )
    )


def qwen3_vl():
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config=QWEN_VISION
            | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            text_config=TEXT | {"head_dim": 16, "rope_parameters": ROPE},
            **QWEN_TOKENS,
        )
    )


# --- pictures, as each family's processor hands them over ------------------------------------


def crops(generator, size, count):
    """A picture of that size [height, width]: the whole of it, and `count` crops."""
    return {
        "pixel_values": torch.randn(1 + count, 3, 56, 56, generator=generator),
        "image_sizes": torch.tensor([size]),
    }


def anyres(generator, index):
    """Crops side by side; crops upon each other with some of them padding; four crops."""
    return crops(generator, *(([56, 112], 2), ([112, 40], 2), ([112, 112], 4))[index])


def square(generator, index):
    return {"pixel_values": torch.randn(1, 3, 112, 112, generator=generator)}


def grid(generator, index, prefix=""):
    """Patches of a Qwen picture: 16, 12 or 6 tokens of 2 x 2 patches each."""
    time, height, width = ((1, 8, 8), (1, 4, 12), (1, 6, 4))[index]
    name = "video" if prefix else "image"
    return {
        "pixel_values" + prefix: torch.randn(time * height * width, 96, generator=generator),
        f"{name}_grid_thw": torch.tensor([[time, height, width]]),
    }


@dataclass(frozen=True)
class TinyFamily:
    make: Callable
    picture: Callable
    """(generator, 0 | 1 | 2) -> what the model is given of one picture, by name."""
    types: bool = False
    """Whether the model wants to be told what kind of token each one is."""

    def model(self, attention, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        model = self.make().eval().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.12)
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = None  # every case runs to its full length
        model.generation_config.pad_token_id = 0
        return model

    def batch(self, model, *prompts, seed=0):
        """Left-padded inputs: a prompt is (pictures, words of text), the pictures as their indices.

        Each prompt has <bos> and some text, then per picture its placeholders and a word.
        """
        generator = torch.Generator().manual_seed(seed)
        rows, pictures = [], []
        for indices, text in prompts:
            parts = [torch.tensor([1]), words(3, generator)]
            for index in indices:
                pictures.append(self.picture(generator, index))
                placeholders = torch.full((self.tokens(model, pictures[-1]),), IMAGE)
                parts += [placeholders, words(2, generator)]
            rows.append(torch.cat([*parts, words(text, generator)]))
        width = max(map(len, rows))
        pads = [width - len(row) for row in rows]
        pad = torch.nn.functional.pad
        inputs = {
            "input_ids": torch.stack([pad(r, (n, 0)) for r, n in zip(rows, pads, strict=True)]),
            "attention_mask": torch.stack([(torch.arange(width) >= n).long() for n in pads]),
        }
        if self.types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        for name in pictures[0] if pictures else ():
            inputs[name] = torch.cat([picture[name] for picture in pictures]).to(
                model.dtype if name == "pixel_values" else torch.long
            )
        return inputs

    @staticmethod
    @torch.no_grad()
    def tokens(model, picture):
        """How many visual tokens the model makes of a picture."""
        pixels = {"pixel_values": picture["pixel_values"].to(model.dtype)}
        features = model.get_image_features(**picture | pixels, return_dict=True).pooler_output
        return sum(len(part) for part in features)


def words(count, generator):
    """Ids of words leave out those that mean something."""
    return torch.randint(3, 96, (count,), generator=generator)


FAMILIES = {
    "llava_next": TinyFamily(llava_next, anyres),
    "llava_onevision": TinyFamily(llava_onevision, anyres),
    "internvl": TinyFamily(lambda: internvl(Qwen2Config(**TEXT)), square),
    "internvl_qwen3": TinyFamily(lambda: internvl(Qwen3Config(**TEXT, head_dim=16)), square),
    "qwen2_5_vl": TinyFamily(qwen2_5_vl, grid, types=True),
    "qwen3_vl": TinyFamily(qwen3_vl, grid, types=True),
}
