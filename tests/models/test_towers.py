"""What each family's vision tower is taken to have seen, and which row of the text shows what."""

import pytest
import torch
from tiny_models import FAMILIES
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

import vtp_kernels as vtp
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families.tiny import TEXT, VISION, anyres, crops, square
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch

IMAGES = (0, 2, 1, 0)


def several(picture):
    generator = torch.Generator().manual_seed(7)
    parts = [picture(generator, index) for index in IMAGES]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def encode(model, family, pictures, source="similarity", **settings):
    """What was seen of the pictures; what went into the projector and what came out; the rows that
    the text gets; by layer, the weights of the tower's attention."""
    base, found, weights = model.model, {}, []

    def project(module, args, output):
        found.update(given=args[0], projected=output.flatten(0, 1))

    watch = VisionWatch(base, PAGES[family].tower(base), source, None)
    hooks = [base.multi_modal_projector.register_forward_hook(project)]
    for attention in watch.tower.attentions:
        look = attention.register_forward_hook(lambda m, args, output: weights.append(output[1]))
        hooks.append(look)
    watch.attach()
    output = base.get_image_features(**pictures, return_dict=True, **settings)
    watch.detach()
    for hook in hooks:
        hook.remove()
    rows = output.pooler_output
    rows = rows.flatten(0, 1) if isinstance(rows, torch.Tensor) else torch.cat(rows)
    return getattr(output, SEEN), found, rows, weights


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_rows_show_the_tokens_of_crops(family):
    model = FAMILIES[family].model("sdpa")
    seen, found, rows, _ = encode(model, family, several(anyres))
    assert len(seen.shows) == len(rows)
    newline = seen.shows < 0
    assert 0 < newline.sum() < len(rows) / 2
    assert torch.equal(rows[newline], model.model.image_newline.expand(int(newline.sum()), -1))
    assert torch.equal(rows[~newline], found["projected"][seen.shows[~newline]])


@torch.no_grad()
def test_pictures_among_others_are_not_cut_in_onevision():
    model = FAMILIES["llava_onevision"].model("sdpa")
    whole = {
        "pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
        "image_sizes": torch.tensor([[112, 112], [56, 112]]),
        "batch_num_images": torch.tensor([2]),
    }
    seen, found, rows, _ = encode(model, "llava_onevision", whole)
    newline = seen.shows < 0
    assert newline.nonzero()[:, 0].tolist() == [16, 33]
    assert torch.equal(rows[~newline], found["projected"][seen.shows[~newline]])


@torch.no_grad()
def test_rows_of_a_picture_that_was_scaled_down_show_what_is_nearest():
    """Twelve crops have room for nine: 16 x 12 tokens become 13 x 10."""
    model = FAMILIES["llava_onevision"].model("sdpa")
    model.config.image_grid_pinpoints = [[224, 168]]
    pictures = crops(torch.Generator().manual_seed(3), [224, 168], 12)
    seen, _, rows, _ = encode(model, "llava_onevision", pictures)
    assert len(rows) == len(seen.shows) == 16 + 13 * 11
    shows = seen.shows[16:].view(13, 11)
    assert seen.shows[:16].tolist() == list(range(16))
    assert (shows[:, 10] == -1).all()
    for i in range(13):
        for j in range(10):
            y, x = ((k + 0.5) * old / new - 0.5 for k, old, new in ((i, 16, 13), (j, 12, 10)))
            y, x = round(max(y, 0)), round(max(x, 0))
            crop = 1 + y // 4 * 3 + x // 4
            assert shows[i, j] == 16 * crop + y % 4 * 4 + x % 4


def internvl(**settings):
    torch.manual_seed(0)
    vision = InternVLVisionConfig(**VISION, image_size=112, patch_size=14, **settings)
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=99
    )
    model = InternVLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.12)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}],
    ids=["plain", "norms"],
)
@pytest.mark.parametrize("layer", [-1, -2])
def test_tokens_of_internvl_are_four_patches(settings, layer):
    model = internvl(**settings)
    seen, found, rows, weights = encode(
        model, "internvl", several(square(112)), "attention", vision_feature_layer=layer
    )
    # The projector gets the four patches of each token side by side.
    given = found["given"]
    assert seen.features.shape == (4, 16, 32) and given.shape == (4, 16, 128)
    expected = given.view(4, 16, 4, 32).mean(2)
    torch.testing.assert_close(seen.features, expected)
    assert torch.equal(rows, found["projected"]) and torch.equal(seen.shows, torch.arange(64))
    # CLS pays attention to 8 x 8 patches; tokens are squares of 2 x 2 of them.
    paid = weights[layer][:, :, 0, 1:].mean(1).view(4, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(seen.attention, paid)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl"])
def test_what_stays_comes_up_to_the_knee(family):
    """Through the whole model: rows whose token is in the head of its picture's curve."""
    tiny = FAMILIES[family]
    model = tiny.model("sdpa")
    inputs = tiny.batch(model, ((0,), 4), ((2, 1), 2), ((), 3))
    pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")}
    seen, *_ = encode(model, family, pictures)
    chosen, _ = vtp.cls_inflection(seen.features, seen.summary, min_keep=3, backend="reference")
    head = torch.zeros(seen.features.shape[:2], dtype=torch.bool)
    for picture, count in enumerate(chosen.counts.tolist()):
        head[picture, chosen.indices[picture, :count]] = True
    stays = torch.cat((head.flatten(), torch.tensor([True])))[seen.shows]
    assert 0.05 < stays.float().mean() < 0.95
    with vtp.prune(model, vtp.InflectionPruning(min_keep=3, llm_layers=())) as run:
        model(**inputs)
    kept = run.report().kept
    assert torch.equal(kept[0][kept.visual], stays)


@pytest.mark.parametrize("source", ["similarity", "attention"])
def test_a_tower_of_which_nothing_is_known_is_refused(source, monkeypatch):
    model = FAMILIES["llava_next"].model("sdpa")
    monkeypatch.setattr(model.model.vision_tower.config, "model_type", "vit")
    with pytest.raises(NotImplementedError, match=r"llava_next cannot run InflectionPruning\("):
        vtp.apply(model, vtp.InflectionPruning(source, llm_layers=(4,)))
    assert "get_image_features" not in vars(model.model)
    vtp.apply(model, vtp.InflectionPruning(None, llm_layers=(4,))).remove()
