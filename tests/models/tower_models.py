"""Small models with vision towers of all kinds, random weights, and what they are given to see."""

import torch
import transformers
from tiny_llava import ENCODES_FIRST
from tiny_models import ALL, TinyFamily
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families.qwen2_vl import QWEN_TOKENS, QWEN_VISION, ROPE
from vtp_kernels.models.families.tiny import IMAGE, TEXT, VISION, Tiny, siglip

SQUARE = VISION | {"image_size": 56, "patch_size": 14}
SIZES = [[56, 56], [28, 84], [56, 28]]  # of three pictures
GRIDS = [[1, 8, 8], [1, 4, 12], [1, 6, 4]]
VIDEO_GRIDS = [[3, 4, 8], [2, 8, 4]]


def llava(vision):
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return LlavaForConditionalGeneration(config)


def dinov2():
    return llava(transformers.Dinov2Config(**SQUARE, mlp_ratio=2))


def registers():
    settings = SQUARE | {"mlp_ratio": 2, "num_register_tokens": 3}
    return llava(transformers.Dinov2WithRegistersConfig(**settings))


def dinov3():
    return llava(transformers.DINOv3ViTConfig(**SQUARE, num_register_tokens=2))


def qwen2_5_vl_whole():
    """The last layer of the tower attends to whole pictures, as in released models."""
    model = PAGES["qwen2_5_vl"].tiny()["qwen2_5_vl"].make()
    model.model.visual.fullatt_block_indexes = [len(model.model.visual.blocks) - 1]
    return model


def of(name, **settings):
    """A model of transformers by the beginning of its name."""
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    return model(getattr(transformers, f"{name}Config")(**settings))


def lfm2_vl():
    vision = VISION | {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4}
    return of(
        "Lfm2Vl",
        vision_config=vision,
        text_config=transformers.Lfm2Config(**TEXT, full_attn_idxs=[1, 3, 5]),
        image_token_id=IMAGE,
        downsample_factor=2,
    )


def paligemma():
    return of(
        "PaliGemma",
        vision_config=siglip(),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
    )


def gemma3():
    return of(
        "Gemma3",
        vision_config=siglip(),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )


def cohere(name, **settings):
    text = transformers.Cohere2Config(**TEXT, sliding_window=8)
    return of(name, vision_config=siglip(), text_config=text, downsample_factor=2, **settings)


def qwen3_5():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 2}
    rope = ROPE | {"partial_rotary_factor": 1.0}
    more = {"num_position_embeddings": 64, "deepstack_visual_indexes": []}
    return of(
        "Qwen3_5",
        vision_config=QWEN_VISION | more,
        text_config=TEXT | {"head_dim": 16, "rope_parameters": rope} | linear,
        **QWEN_TOKENS,
    )


def changed(name, **settings):
    """The family's own small model, with some settings of its configuration changed; those of its
    parts as part__setting."""
    config = ALL[name].make().config
    for where, value in settings.items():
        *parts, setting = where.split("__")
        part = getattr(config, parts[0]) if parts else config
        setattr(part, setting, value)
    return getattr(transformers, ALL[name].page.architectures[0])(config)


#: Towers that no tiny family has: how to make a model, and of which family.
OTHERS = {
    "dinov2": (dinov2, "llava"),
    "registers": (registers, "llava"),
    "dinov3": (dinov3, "llava"),
    "qwen2_5_vl whole": (qwen2_5_vl_whole, "qwen2_5_vl"),
    "lfm2_vl": (lfm2_vl, "lfm2_vl"),
    "paligemma": (paligemma, "paligemma"),
    "gemma3": (gemma3, "gemma3"),
    "aya_vision": (lambda: cohere("AyaVision", image_token_index=IMAGE), "aya_vision"),
    "cohere2_vision": (lambda: cohere("Cohere2Vision", image_token_id=IMAGE), "cohere2_vision"),
    "qwen3_5": (qwen3_5, "qwen3_5"),
    "ovis2 squares": (lambda: changed("ovis2", vision_config__hidden_stride=2), "ovis2"),
    "granite_docling fine": (
        lambda: changed("granite_docling", vision_config__use_fine_route=True),
        "granite_docling",
    ),
    "granite4_vision windows": (
        lambda: changed("granite4_vision", downsample_rate="2/4"),
        "granite4_vision",
    ),
}


TOWER_MODELS = (*ALL, *OTHERS)


def tower_model(name, attention="eager"):
    """The model, the module that encodes its pictures, and its family."""
    if name in OTHERS:
        make, family = OTHERS[name]
        tiny = TinyFamily(PAGES.get(family), Tiny(make, None))
    else:
        tiny = ALL[name]
        family = tiny.page.name
    model = tiny.model(attention)
    base = model.model if tiny.page is None else tiny.page.base(model)
    # In an older transformers some encode pictures at the top.
    return model, base if hasattr(base, "get_image_features") else model, family


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def packed_pictures(grids, modality):
    pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
    grid = torch.tensor(grids)
    return {pixels: random(int(grid.prod(1).sum()), 96), f"{modality}_grid_thw": grid}


def square_pictures():
    return {"pixel_values": random(3, 3, 56, 56)}


def sized_pictures():
    return {"pixel_values": random(3, 3, 56, 84), "image_sizes": torch.tensor(SIZES)}


def patched_pictures():
    """As SigLIP2 is given them: of 16, 12 and 8 patches."""
    counts = torch.tensor([16, 12, 8])
    return {
        "pixel_values": random(3, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4], [2, 6], [4, 2]]),
        "pixel_attention_mask": (torch.arange(16) < counts[:, None]).long(),
    }


def masked_pictures():
    """As Idefics3 is given them: a prompt with two, one of which is not square, and one with one,
    beside which nothing is."""
    mask = torch.ones(2, 2, 56, 56, dtype=torch.long)
    mask[0, 1, 28:] = 0
    pixels = random(2, 2, 3, 56, 56)
    pixels[1, 1] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def sliced_pictures(modality="image"):
    """As MiniCPM is given them: pictures and slices, or frames, side by side."""
    pixels, sizes = ("pixel_values", "target_sizes")
    if modality == "video":
        pixels, sizes = ("pixel_values_videos", "target_sizes_videos")
    grids = torch.tensor([[16, 16], [8, 24], [12, 8]])
    if not ENCODES_FIRST:
        grids[:] = grids[1]  # an older transformers takes no others in one call
    return {pixels: random(1, 3, 4, 4 * int(grids.prod(1).sum())), sizes: grids}


def pictures_to_scale(grids, modality):
    """As VideoLLaMA 3 is given them."""
    given = packed_pictures(grids, modality)
    pixels = next(iter(given))
    given[pixels] = given[pixels][:, :48]
    return given | {f"{modality}_merge_sizes": torch.tensor([2, 1, 2][: len(grids)])}


def videos():
    """Two of three frames."""
    return {"pixel_values_videos": random(2, 3, 3, 56, 56)}
