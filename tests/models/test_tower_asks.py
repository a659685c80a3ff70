"""What a method may ask of a vision tower besides scores: of any layer, of every kind of tower."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from test_tower_scores import PATCHES, pictures_of
from tiny_llava import one, tiny_llava
from tiny_models import FAMILIES
from tower_models import (
    GRIDS,
    TOWER_MODELS,
    VIDEO_GRIDS,
    masked_pictures,
    packed_pictures,
    patched_pictures,
    sized_pictures,
    square_pictures,
    tower_model,
    videos,
)
from tower_reference import eager_calls, from_all, in_blocks

import vtp_kernels as vtp
from vtp_kernels.contract.vision import Ask, PromptVision, Seen, Shown
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch
from vtp_kernels.models.towers.qwen import QwenTower

ASKS = tuple(Ask(what, at) for what in ("received", "keys", "hidden") for at in (None, 0, -1))


def pictures(name):
    if name in ("llava_pixtral", "mistral3", "lighton_ocr"):
        return sized_pictures()
    if name == "lfm2_vl":
        return patched_pictures()
    if name in ("idefics3", "smolvlm"):
        return masked_pictures()
    if name == "paddleocr_vl":
        given = packed_pictures(GRIDS, "image")
        return given | {"pixel_values": given["pixel_values"][:, :48].reshape(-1, 3, 4, 4)}
    if name in ("qwen2_5_vl", "qwen3_vl", "cosmos3_edge"):
        return pictures_of(name, GRIDS, "image")
    return square_pictures()


def received(name, weights, given):
    """Of one layer, by rows: [I, M], or [R] where pictures are packed."""
    if "image_grid_thw" in given or "video_grid_thw" in given:
        return torch.cat([paid.mean((0, 1, 2)) for paid in weights])
    if "image_sizes" in given:
        return torch.cat(in_blocks(weights, PATCHES))
    if "spatial_shapes" in given:
        return from_all(weights, given["pixel_attention_mask"].bool())
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[1, 8:] = False
    return from_all(weights, valid if "pixel_attention_mask" in given else None)


def encode(base, modality, given):
    pixels, *more = given.items()
    method = getattr(base, f"get_{modality}_features")
    return method(pixels[1], **dict(more), return_dict=True)


KINDS = (  # of vision models, and of ways to make visual tokens of what they put out
    *("llava", "dinov2", "registers", "dinov3", "internvl", "aya_vision", "idefics3", "paligemma"),
    *("gemma3", "janus", "llava_pixtral", "mistral3", "lfm2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("cosmos3_edge", "paddleocr_vl"),
)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, modality",
    [
        *((name, "image") for name in KINDS if name in TOWER_MODELS),
        *((name, "video") for name in ("llava_next_video", "llava_onevision", "qwen2_5_vl")),
    ],
)
def test_asks(name, modality):
    """As the eager attention has keys and weights and blocks put out rows, which then become tokens
    as scores do; how these do, test_tower_scores.py shows."""
    given = pictures(name)
    if modality == "video":
        qwen = name == "qwen2_5_vl"
        given = pictures_of(name, VIDEO_GRIDS, "video") if qwen else videos()
    _, base, family = tower_model(name)
    tower = PAGES[family].tower(base)
    watch, looked, blocks = VisionWatch(base, tower, ASKS, None), {}, {}
    hooks = [
        block.register_forward_hook(lambda module, args, out: blocks.update({module: out}))
        for block in tower.layers.blocks
    ]
    read = type(tower).read

    def note(self, modality, given, output, rows):
        looked.update(rows)
        return read(self, modality, given, output, rows)

    watch.attach()
    with mock.patch.object(type(tower), "read", note), eager_calls(tower.attentions) as calls:
        output = encode(base, modality, given)
    watch.detach()
    for hook in hooks:
        hook.remove()
    feature = tower.attentions.index(tower.scoring(modality, given))
    assert looked.keys() == set(ASKS) - {Ask("hidden")}
    for ask, rows in looked.items():
        layer = feature if ask.layer is None else ask.layer % len(tower.attentions)
        weights, keys = zip(*calls[tower.attentions[layer]], strict=True)
        if ask.what == "hidden":
            expected = blocks[tower.layers.blocks[layer]]
            expected = expected[0] if isinstance(expected, tuple) else expected
        elif ask.what == "keys":
            expected = torch.cat([key.mean(1) for key in keys], dim=int(len(keys) > 1))
        else:
            expected = received(name, weights, given)
        torch.testing.assert_close(rows, expected.view_as(rows), rtol=0, atol=1e-5)
        assert expected.std() > 1e-5
    seen = getattr(output, SEEN)
    check_pooling(tower, modality, given, output, looked, seen)
    check_grids(tower, modality, given, output, looked, seen)


def check_pooling(tower, modality, given, output, looked, seen):
    """Every column of a vector becomes tokens as scores do."""
    for ask, rows in looked.items():
        if ask.what == "received":
            continue
        columns = {Ask("attention", 0): rows[..., 0], Ask("attention", 1): rows[..., -1]}
        pooled = tower.read(modality, given, output, columns).values.values()
        for index, column in zip((0, -1), pooled, strict=True):
            torch.testing.assert_close(seen.values[ask][..., index], column, rtol=0, atol=1e-6)


def check_grids(tower, modality, given, output, looked, seen):
    """Tokens stand line by line: where their patches are, on the mean."""
    here = torch.ones(seen.features.shape[:2], dtype=torch.bool) if seen.here is None else seen.here
    assert [rows * columns for rows, columns in seen.grids] == here.sum(1).tolist()
    if f"{modality}_grid_thw" in given and tower.layers.model.config.model_type in QwenTower.models:
        return  # patches come square by square
    rows = looked[Ask("keys")]
    prefix = tower.layers.prefix
    if rows.dim() == 3:
        sizes = given.get("spatial_shapes")
        side = round((rows.shape[1] - prefix) ** 0.5)
        sizes = [(side, side)] * len(rows) if sizes is None else sizes.tolist()
    elif "image_sizes" in given:
        sizes = tower.layers.grids(given)
    else:
        sizes = [(h, w) for t, h, w in given["image_grid_thw"].tolist() for _ in range(t)]
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).float() for h, w in sizes]
    if rows.dim() == 3:
        wide = rows.new_zeros(*rows.shape[:2], 2)
        for picture, own in zip(wide, places, strict=True):
            picture[prefix : prefix + len(own)] = own
    else:
        wide = torch.cat(places)
    pooled = tower.read(modality, given, output, {Ask("keys"): wide}).values[Ask("keys")]
    for picture, (down, across), real in zip(pooled, seen.grids, here, strict=True):
        y, x = picture[real].view(down, across, 2).unbind(-1)
        assert (y.diff(dim=0) > 0).all() and (y.diff(dim=1).abs() < 1e-4).all()
        assert (x.diff(dim=1) > 0).all() and (x.diff(dim=0).abs() < 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_rows_have_what_their_tokens_have(name):
    """In a batch of several pictures, of crops or of several sizes."""
    model = FAMILIES[name].model("sdpa")
    inputs = FAMILIES[name].batch(model, ((0,), 3), ((1, 2), 5))
    keys, scores = Ask("keys"), Ask("received", 0.5)
    found = {}

    @dataclass(frozen=True)
    class Look(vtp.Method):
        def decision_layers(self, depth):
            return (0,)

        def vision_source(self):
            return keys, scores

        def decide(self, layer, rows):
            first = rows.visual & (rows.visual_ordinal % 7 == 3)
            found.update(vision=rows.vision, visual=rows.visual, first=first)
            found.update(keys=rows.vision.of_rows(keys), scores=rows.vision.of_rows(scores))
            found["beside"] = rows.vision.next_to(first)
            with pytest.raises(ValueError, match=r"what='keys', layer=1.* was not asked for"):
                rows.vision.of_rows(Ask("keys", 1))

    with vtp.prune(model, Look()):
        model(**inputs)
    vision, visual = found["vision"], found["visual"]
    shows = vision.shows[visual].tolist()
    width = vision.seen.features.shape[1]
    none = [token < 0 for token in shows]
    assert any(none) == (name == "llava_onevision")
    for token, key, score in zip(
        shows, found["keys"][visual], found["scores"][visual], strict=True
    ):
        if token < 0:
            assert score.isnan() and not key.any()
        else:
            assert score == vision.values(scores)[token // width, token % width]
            assert torch.equal(key, vision.values(keys)[token // width, token % width])
    for shown, first, beside in zip(vision.shows, found["first"], found["beside"], strict=True):
        around = set()
        for token in shown[first].tolist():
            picture, place = divmod(token, width)
            y, x = divmod(place, vision.seen.grids[picture][1])
            for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                around.add((picture, y + down, x + right))
        expected = []
        for token in shown.tolist():
            picture, place = divmod(token, width)
            columns = vision.seen.grids[picture][1]
            expected.append(token >= 0 and (picture, *divmod(place, columns)) in around)
        assert beside.tolist() == expected and any(expected)


def test_copies_of_a_prompt_have_neighbours_of_their_own():
    """As beams are: every copy shows the same pictures, and chooses for itself."""
    features = torch.zeros(1, 4, 2)
    rows = torch.ones(2, 4, dtype=torch.bool)
    seen = Seen(features, features[:, 0], {}, torch.arange(4), [(2, 2)])
    vision = PromptVision([Shown(seen, rows, [4, 4])], None)
    chosen = torch.tensor([[True, False, False, False], [False] * 4])
    assert vision.next_to(chosen).tolist() == [[False, True, True, False], [False] * 4]


def asking(source):
    body = {
        "decision_layers": lambda self, depth: (0,),
        "vision_source": lambda self: source,
        "decide": lambda self, layer, rows: None,
        "__module__": __name__,
    }
    return dataclass(frozen=True)(type("Asking", (vtp.Method,), body))()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ask("values"), ValueError, "expected one of .*'hidden'.* got 'values'"),
        (lambda: Ask("keys", "2", "X.layer"), TypeError, r"X\.layer: a layer .* got '2'"),
        (lambda: Ask("keys", True, "X.layer"), TypeError, r"X\.layer: a layer .* got True"),
        (lambda: Ask("keys", 1.5, "X.layer"), ValueError, r"X\.layer: a share .* got 1\.5"),
        (lambda: Ask("similarity", 2), ValueError, "layer: similarity is of the features, got 2"),
        (lambda: asking("valeus"), ValueError, r"Asking\.vision_source: expected one of .*valeus"),
        (lambda: asking(3), TypeError, r"Asking\.vision_source: expected one or several of"),
        (lambda: asking(["keys", 3]), ValueError, r"Asking\.vision_source: expected one of .*3"),
        (lambda: asking(Ask("keys", 9, "X.layer")), ValueError, r"X\.layer: there is no layer 9"),
        (lambda: asking(Ask("keys", -9)), ValueError, "layer of 'keys': there is no layer -9"),
    ],
)
def test_asks_that_cannot_be(make, error, message):
    model = tiny_llava()
    with pytest.raises(error, match=message):
        vtp.apply(model, make())
    vtp.apply(model, asking(("attention", "keys", "cls"))).remove()  # nothing was left behind


def test_a_tower_without_cls_is_asked_for_cls():
    model = FAMILIES["llava_onevision"].model("sdpa")
    with pytest.raises(NotImplementedError, match=r"X\.y: asks .* for cls: a 'siglip_vision"):
        vtp.apply(model, asking(Ask("cls", setting="X.y")))


def test_shares_of_the_depth():
    assert [Ask("keys", share).index(24) for share in (0.375, 0.5, 1.0, 0.01)] == [8, 11, 23, 0]
    assert [Ask("keys", layer).index(24) for layer in (0, 23, -1, -24)] == [0, 23, 23, 0]


@torch.no_grad()
def test_how_tokens_stand_in_pictures_that_are_not_square_is_not_known():
    model = tiny_llava()
    tower = PAGES["llava"].tower(model.model)
    assert tower._lines("image", {"pixel_values": torch.zeros(1, 3, 28, 56)}, 1, 16) is None
    inputs = one()
    watch = VisionWatch(model.model, tower, "attention", None)
    watch.attach()
    seen = getattr(model.model.get_image_features(inputs["pixel_values"]), SEEN)
    watch.detach()
    rows = torch.ones(1, seen.features.shape[1], dtype=torch.bool)
    vision = PromptVision([Shown(seen._replace(grids=None), rows, [rows.shape[1]])], None)
    with pytest.raises(NotImplementedError, match="how the tokens of these pictures stand"):
        vision.next_to(rows)
