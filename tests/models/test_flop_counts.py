"""Every formula for FLOPs against what torch counts on a small model."""

import importlib

import pytest
import torch
from tiny_models import FAMILIES, LINEAR
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForImageTextToText,
    AyaVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GotOcr2Config,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)
from transformers.models.got_ocr2 import GotOcr2VisionConfig

import vtp_kernels as vtp
from vtp_kernels.flop_counts.pictures import PROJECTORS
from vtp_kernels.flop_counts.text import TEXT, decoder_layers
from vtp_kernels.flop_counts.towers import features
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families import parts_of, tiny
from vtp_kernels.models.families.qwen2_vl import QWEN_VISION

# Some transformers multiply matrices to get angles of rotary embeddings, which is not counted.
CLOSE = 1e-3


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# ---- language models --------------------------------------------------------------------------

# Settings of all: those that a model does not have, it must not be counted with.
SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "moe_num_shared_experts": 1,
    "block_multiple_of": 8,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
OWN = {
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [40, 24],
        "moe_k": 3,
        "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]},
    },
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm4v_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm_ocr_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen3_omni_moe_text": {"rope_parameters": MROPE},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_vl_moe_text": {"rope_parameters": MROPE},
    "qwen3_vl_text": {"rope_parameters": MROPE},
}
NOT_AUTO = {
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextModel"),
    "granite4_vision_text": ("granite4_vision", "Granite4VisionTextModel"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    "paddleocr_vl_text": ("paddleocr_vl", "PaddleOCRTextModel"),
    "qwen2_5_omni_text": ("qwen2_5_omni", "Qwen2_5OmniThinkerTextModel"),
}


def language_model(kind, **settings):
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers has none")
    config = CONFIG_MAPPING[kind](**SIZES | OWN.get(kind, {}) | settings)
    make = AutoModel.from_config
    if kind in NOT_AUTO:
        folder, name = NOT_AUTO[kind]
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        make = getattr(module, name)._from_config
    model = make(config, attn_implementation="eager")  # torch counts no SDPA on a CPU
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("kind", TEXT)
def test_language_models(kind):
    model = language_model(kind)
    rows = torch.randn(1, 7, 64)
    torch_count = counted(lambda: model(inputs_embeds=rows, use_cache=False))
    padded = "qwen3_5" in kind or kind in ("lfm2", "qwen3_next")  # their convolutions
    tolerance = 0.01 if padded else CLOSE
    assert vtp.flops(model, 7, visual=0) == pytest.approx(torch_count, rel=tolerance)


def test_experts_for_visual_tokens():
    """Of five rows three are visual."""
    model, rows = language_model("ernie4_5_vl_moe_text"), torch.randn(1, 5, 64)
    types = torch.tensor([[0, 1, 1, 2, 0]])
    torch_count = counted(
        lambda: model(inputs_embeds=rows, moe_mm_token_type_ids=types, use_cache=False)
    )
    assert vtp.flops(model, 5, visual=3) == pytest.approx(torch_count, rel=CLOSE)
    assert vtp.flops(model, 5, visual=0) > vtp.flops(model, 5, visual=5)
    with pytest.raises(ValueError, match=r"visual: a 'ernie4_5_vl_moe_text' .* experts for visual"):
        vtp.flops(model, 5)
    with pytest.raises(ValueError, match="visual: expected 0 to 5 of the tokens of layer 0, got 6"):
        vtp.flops(model, 5, visual=6)
    with pytest.raises(ValueError, match="visual: got 2 numbers for 4 decoder layers"):
        vtp.flops(model, 5, visual=[3, 2])


def test_sliding_layers_see_their_window():
    """torch computes all pairs and masks them; a layer of a window needs no more than these."""
    narrow, wide = (
        language_model("cohere2", sliding_window=window, sliding_window_pattern=2)
        for window in (8, 64)
    )
    assert narrow.config.layer_types == ["sliding_attention", "full_attention"] * 2
    less = vtp.flops(wide, 40) - vtp.flops(narrow, 40)
    assert less == 2 * 2 * 2 * 64 * 40 * (40 - 8)  # 2 layers, logits and values


def test_chunks_of_linear_attention():
    """Rows are filled up to 64; longer prompts have more of them."""
    model = language_model("qwen3_5_text")
    for rows in (64, 65, 130):
        states = torch.randn(1, rows, 64)
        torch_count = counted(lambda states=states: model(inputs_embeds=states, use_cache=False))
        assert vtp.flops(model, rows) == pytest.approx(torch_count, rel=0.01)


# ---- pictures ---------------------------------------------------------------------------------


def of_pictures(model, images):
    return vtp.flops(model, 1, visual=1, images=images) - vtp.flops(model, 1, visual=1)


def features_of(model, picture):
    """What torch counts when the model looks at it."""
    base = model if hasattr(model, "get_image_features") else model.model
    return counted(lambda: base.get_image_features(**picture, return_dict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family):
    model = family.model("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():  # those of Segment Anything are chosen when they are made
        if type(module).__name__ == "SamVisionSdpaAttention":
            module.__class__ = type(module).__base__
    return model.requires_grad_(False)


def test_reports(family, model):
    """What a pruned call spends in the language model."""
    inputs = family.batch(model, ((0,), 9))
    with vtp.prune(model, vtp.RandomPruning(2, 0.5)) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    report, text = run.report(), parts_of(model).text
    path = next(name for name, module in model.named_modules() if module is text)
    torch_count = sum(counter.get_flop_counts()[f"{type(model).__name__}.{path}"].values())
    if any(layer.window for layer in decoder_layers(text.config)):
        assert report.prefill_flops < torch_count  # which masks what is out of windows
    elif any(layer.chunk for layer in decoder_layers(text.config)):
        assert report.prefill_flops == pytest.approx(torch_count, rel=0.01)
    else:
        assert report.prefill_flops == pytest.approx(torch_count, rel=CLOSE)


def test_all_that_is_taken_can_be_counted():
    assert {kind for page in PAGES.values() for kind in page.text_models} <= TEXT.keys()
    assert PAGES.keys() <= PROJECTORS.keys()


def test_pictures(family, model):
    """The third of those in several sizes, where windows are not full."""
    picture = family.picture(torch.Generator().manual_seed(0), 2)
    vision = model.config.vision_config
    images = picture["pixel_values"].shape[:-3].numel()
    if "image_merge_sizes" in picture:
        picture["image_merge_sizes"] = torch.ones(1, dtype=torch.int64)  # as its processor says
    if "image_grid_thw" in picture:
        images = [[vision.patch_size * n for n in picture["image_grid_thw"][0, 1:].tolist()]]
    elif vision.model_type == "pixtral":
        images = [picture["image_sizes"][0].tolist()]
        height, width = images[0]  # without what fills it up
        picture["pixel_values"] = picture["pixel_values"][..., :height, :width]
    torch_count = features_of(model, picture)
    assert of_pictures(model, images) == pytest.approx(torch_count, rel=CLOSE)


SIZE = (56, 56)
PIXELS = {"pixel_values": torch.zeros(1, 3, *SIZE)}
LLAVA = {"text_config": LlamaConfig(**tiny.TEXT), "image_token_index": tiny.IMAGE}


def other_kinds():
    """(config, picture, its size or its crops'): what the pages' own small models do not have."""
    several = {"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "full"}
    yield LlavaConfig(vision_config=tiny.clip(), **LLAVA, **several), PIXELS, SIZE
    pixtral = PixtralVisionConfig(**tiny.VISION, head_dim=8, image_size=56, patch_size=14)
    last = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    yield LlavaConfig(vision_config=pixtral, **LLAVA, **last), PIXELS, SIZE
    ocr = {"output_channels": 16, "image_size": 64, "patch_size": 4, "mlp_dim": 64}
    ocr |= {"window_size": 6, "global_attn_indexes": [1]}  # of 16 patches a side
    vision = GotOcr2VisionConfig(**tiny.VISION, **ocr)
    yield (
        GotOcr2Config(vision_config=vision, text_config=Qwen2Config(**tiny.TEXT)),
        {"pixel_values": torch.zeros(1, 3, 64, 64)},
        (64, 64),
    )
    yield (
        PaliGemmaConfig(
            vision_config=tiny.siglip(),
            text_config=GemmaConfig(**tiny.TEXT, head_dim=16),
            projection_dim=64,
        ),
        PIXELS,
        SIZE,
    )
    gemma = Gemma3TextConfig(**tiny.TEXT, head_dim=16)
    vision = tiny.siglip()
    yield Gemma3Config(vision_config=vision, text_config=gemma, mm_tokens_per_image=4), PIXELS, SIZE
    for kind in (AyaVisionConfig, Cohere2VisionConfig):
        text = Cohere2Config(**tiny.TEXT)
        yield kind(vision_config=vision, text_config=text, downsample_factor=2), PIXELS, SIZE
    ovis = FAMILIES["ovis2"].make().config
    ovis.vision_config.hidden_stride = 2
    yield ovis, PIXELS, SIZE
    idefics2, granite = FAMILIES["idefics2"], FAMILIES.get("granite4_vision")
    config = idefics2.make().config
    config.perceiver_config.resampler_depth = 2
    smaller = {"pixel_values": torch.ones(1, 1, 3, 28, 56)}
    yield config, smaller | {"pixel_attention_mask": torch.ones(1, 1, 28, 56)}, (28, 56)
    if granite is not None:
        config = granite.make().config
        config.downsample_rate, former = "2/4", config.qformer_config
        former.num_hidden_layers, former.cross_attention_frequency = 3, 2
        yield config, granite.picture(torch.Generator(), 0), [SIZE] * 3
    config = LINEAR["lfm2_vl"].make().config
    tiles = LINEAR["lfm2_vl"].picture(torch.Generator(), 2)
    for name in ("pixel_values", "pixel_attention_mask"):
        tiles[name] = tiles[name][:, :24]  # without what fills it up
    yield config, tiles, (24, 16)
    for name in ("minicpmv4_6", "minicpm_ocr"):
        if name in LINEAR:
            config = LINEAR[name].make().config
            config.merger_times = 1 if name == "minicpm_ocr" else 2
            yield config, LINEAR[name].picture(torch.Generator(), 0), (64, 64)
    text = SIZES | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
    qwen = {"vision_config": QWEN_VISION | {"num_position_embeddings": 64}, "text_config": text}
    for kind in (Qwen3_5Config, Qwen3_5MoeConfig):
        yield kind(**qwen), FAMILIES["qwen3_vl"].picture(torch.Generator(), 2), (24, 16)


@pytest.mark.parametrize(
    "config, picture, size", list(other_kinds()), ids=lambda x: type(x).__name__
)
def test_other_kinds_of_pictures(config, picture, size):
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.requires_grad_(False)
    sizes = size if isinstance(size, list) else [size]
    assert of_pictures(model, sizes) == pytest.approx(features_of(model, picture), rel=CLOSE)


def test_the_head_of_a_tower():
    """It runs, though what it says is not used. torch does not count it as it is run for speed."""
    vision = tiny.siglip()
    vision.vision_use_head = True
    model = AutoModel.from_config(vision, attn_implementation="eager").eval()
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(**PIXELS)
    assert 2 * features(vision, vision.model_type, None).macs == counter.get_total_flops()


def test_pictures_that_cannot_be_counted():
    qwen, clip = FAMILIES["qwen2_vl"].make().config, FAMILIES["llava"].make().config
    for config, images, kind, message in (
        (qwen, 1, NotImplementedError, r"all sizes to a 'qwen2_vl\w*' tower.*or images=0"),
        (qwen, [(32, 12)], ValueError, "multiples of 8 pixels, got 32 x 12"),
        (clip, [(56, 56), (56, 84)], ValueError, "of 56 x 56 pixels, got 56 x 84"),
        (clip.text_config, 1, NotImplementedError, r"has no vision tower.* images=0"),
    ):
        with pytest.raises(kind, match=message):
            vtp.flops(config, 1, images=images)
    clip.model_type = "other"
    with pytest.raises(NotImplementedError, match=r"language model of a 'other' .*pass images=0"):
        vtp.flops(clip, 1, images=1)
