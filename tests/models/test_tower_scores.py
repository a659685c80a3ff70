"""What tokens get in every kind of vision tower: as the tower's own attention weights say."""

from unittest import mock

import pytest
import torch
from inflection_reference import knee
from tiny_llava import ENCODES_FIRST, IMAGE
from tower_models import (
    GRIDS,
    TOWER_MODELS,
    VIDEO_GRIDS,
    masked_pictures,
    packed_pictures,
    patched_pictures,
    pictures_to_scale,
    random,
    sized_pictures,
    sliced_pictures,
    square_pictures,
    tower_model,
    videos,
)
from tower_reference import (
    eager_weights,
    from_all,
    from_cls,
    in_blocks,
    in_segments,
    patches_behind,
)

import vtp_kernels as vtp
from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families.tiny import anyres
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch
from vtp_kernels.models.towers.idefics import IdeficsLayers
from vtp_kernels.models.towers.packed import received_in_segments

QWEN = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_vl whole",
    "qwen2_5_omni_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_5",
    "cosmos3_edge",
    "hyperclovax_vision_v2",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "glm_ocr",
    "exaone4_5",
)
WINDOWS = ("qwen2_5_vl", "qwen2_5_omni_thinker", "hyperclovax_vision_v2", "exaone4_5")
PATCHES = [16, 12, 8]  # of the three pictures that have a size of their own


def look(name, modality, given, attention="eager"):
    """The model; what was seen; what the tower's own attention paid; what came out of it."""
    _, base, family = tower_model(name, attention)
    tower = PAGES[family].tower(base)
    watch = VisionWatch(base, tower, "attention", None)
    watch.attach()
    with torch.no_grad(), eager_weights(tower.scoring(modality, given)) as weights:
        # The pixels of videos have different names in different versions.
        pixels, *more = given.items()
        encode = getattr(base, f"get_{modality}_features")
        output = encode(pixels[1], **dict(more), return_dict=True)
    watch.detach()
    return base, getattr(output, SEEN), weights, output


def assert_seen(seen, features, attention):
    """`features` and `attention` of each picture, of as many tokens as it has."""
    assert len(seen.features) == len(features) == len(attention)
    for index, (rows, paid) in enumerate(zip(features, attention, strict=True)):
        n = len(paid)
        assert seen.here is None or seen.here[index].tolist() == [
            column < n for column in range(seen.features.shape[1])
        ]
        torch.testing.assert_close(seen.features[index, :n], rows)
        torch.testing.assert_close(seen.attention[index, :n], paid, rtol=0, atol=1e-6)
    if seen.here is None:
        assert {len(paid) for paid in attention} == {seen.features.shape[1]}


@pytest.mark.parametrize("name, prefix", [("dinov2", 1), ("registers", 4), ("dinov3", 3)])
def test_cls_of_dino_pays_the_patches(name, prefix):
    _, seen, weights, output = look(name, "image", square_pictures())
    hidden = output.hidden_states[-2]
    assert_seen(seen, hidden[:, prefix:], from_cls(weights, prefix))
    assert torch.equal(seen.summary, hidden[:, 0])
    # The text gets registers as well: they show nothing of the picture.
    order = torch.arange(48).view(3, 16).tolist()
    shows = [[-1] * (prefix - 1) + row for row in order]
    assert seen.shows.tolist() == [token for row in shows for token in row]
    assert [len(rows) for rows in output.pooler_output] == [len(row) for row in shows]


@pytest.mark.parametrize("name", ["llava_pixtral", "mistral3", "lighton_ocr"])
def test_pictures_of_pixtral_attend_to_themselves(name):
    given = sized_pictures()
    base, seen, weights, output = look(name, "image", given)
    states = output.last_hidden_state[0]
    squares = patches_behind(lambda x: project(base, x, given["image_sizes"]), states)
    counts = [len(rows) for rows in output.pooler_output]
    received = torch.cat(in_blocks(weights, PATCHES))
    features = torch.stack([states[square].mean(0) for square in squares])
    paid = torch.stack([received[square].mean() for square in squares])
    assert_seen(seen, features.split(counts), paid.split(counts))
    for summary, rows in zip(seen.summary, features.split(counts), strict=True):
        torch.testing.assert_close(summary, rows.mean(0))
    assert in_order(seen) == sum(counts)


def project(base, states, sizes):
    """What the model makes of its tower's output, told the sizes where it asks for them."""
    if hasattr(base, "vision_projection"):
        return base.vision_projection(states, sizes.tolist())
    more = () if base.config.model_type == "llava" else (sizes,)
    return base.multi_modal_projector(states, *more)


def pictures_of(name, grids, modality):
    """In the form that a family wants: some have patches of one frame, not of two."""
    given = packed_pictures(grids, modality)
    if name in ("cosmos3_edge", "ernie4_5_vl_moe"):
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        given[pixels] = given[pixels][:, :48]
    return given


@torch.no_grad()
def merged(base, output, grids):
    """Rows as the model makes them of squares, in the order of the tower's layers."""
    states = output.last_hidden_state
    if hasattr(base, "resampler_model"):
        return base.resampler_model(states, torch.tensor(grids))
    vision = getattr(base, "visual", None) or base.vision_model
    states = vision.merger(states) if hasattr(vision, "merger") else states
    return base.projector(states) if hasattr(base, "projector") else states


def in_order(seen):
    """How many tokens there are, if every row shows the next one."""
    here = torch.ones(seen.features.shape[:2]) if seen.here is None else seen.here
    assert seen.shows.tolist() == here.reshape(-1).nonzero()[:, 0].tolist()
    return len(seen.shows)


def test_padding_of_siglip2_neither_pays_nor_counts():
    given = patched_pictures()
    base, seen, weights, output = look("lfm2_vl", "image", given)
    features, paid = [], []
    for index, received in enumerate(from_all(weights, given["pixel_attention_mask"].bool())):
        h, w = given["spatial_shapes"][index].tolist()
        states = output.last_hidden_state[index, : h * w]
        squares = patches_behind(
            lambda x, h=h, w=w: base.multi_modal_projector(x.view(1, h, w, -1)), states
        )
        assert len(squares) == len(output.pooler_output[index])
        features.append(torch.stack([states[square].mean(0) for square in squares]))
        paid.append(torch.stack([received[square].mean() for square in squares]))
    assert_seen(seen, features, paid)
    for summary, rows in zip(seen.summary, features, strict=True):
        torch.testing.assert_close(summary, rows.mean(0))
    assert in_order(seen) == 9


@pytest.mark.parametrize(
    "name, modality",
    [
        *((name, "image") for name in (*QWEN, "ernie4_5_vl_moe") if name in TOWER_MODELS),
        *((name, "video") for name in QWEN if name in TOWER_MODELS),
    ],
)
def test_squares_of_qwen_have_the_mean_of_their_patches(name, modality):
    """By segments as the last layer has them, pictures, frames or windows, and in the order in
    which the tower hands the squares over. A frame is a picture."""
    grids = GRIDS if modality == "image" else VIDEO_GRIDS
    base, seen, weights, output = look(name, modality, pictures_of(name, grids, modality))
    rows = torch.cat(output.pooler_output)
    received = in_segments(weights, merged(base, output, grids), rows)
    frames = [h * w // 4 for t, h, w in grids for _ in range(t)]
    assert_seen(seen, rows.split(frames), received.split(frames))
    for summary, tokens in zip(seen.summary, rows.split(frames), strict=True):
        torch.testing.assert_close(summary, tokens.mean(0))
    assert in_order(seen) == len(rows)
    segments = {len(paid[0, 0]) for paid in weights}
    assert (max(segments) == 16) == (name in WINDOWS)  # of 4 x 4 patches


def test_squares_of_paddleocr_have_the_mean_of_their_patches():
    given = packed_pictures(GRIDS, "image")
    given["pixel_values"] = given["pixel_values"][:, :48].reshape(-1, 3, 4, 4)
    base, seen, weights, output = look("paddleocr_vl", "image", given)
    states = output.last_hidden_state
    squares = patches_behind(lambda x: base.projector(x, given["image_grid_thw"]), states)
    received = torch.cat([paid.mean((0, 1, 2)) for paid in weights])
    features = torch.stack([states[square].mean(0) for square in squares])
    paid = torch.stack([received[square].mean() for square in squares])
    assert_seen(seen, features.split([16, 12, 6]), paid.split([16, 12, 6]))
    assert in_order(seen) == 34


def means(states, received, patches):
    """Of tokens, the mean of what the patches behind them have."""
    features = torch.stack([states[square].mean(0) for square in patches])
    return features, torch.stack([received[square].mean() for square in patches])


def test_tokens_of_ernies_videos_show_two_frames():
    grids = [[4, 4, 8], [2, 8, 4]]
    given = pictures_of("ernie4_5_vl_moe", grids, "video")
    base, seen, weights, output = look("ernie4_5_vl_moe", "video", given)
    states = output.last_hidden_state
    patches = patches_behind(lambda x: base.resampler_model(x, torch.tensor(grids)), states)
    assert {len(square) for square in patches} == {8}
    _, paid = means(states, torch.cat([paid.mean((0, 1, 2)) for paid in weights]), patches)
    assert_seen(seen, torch.cat(output.pooler_output).split(8), paid.split(8))
    assert in_order(seen) == 24


@pytest.mark.parametrize("modality", ["image", "video"])
def test_what_videollama_scales_down(modality):
    """Squares of patches, by a factor that each picture has for itself."""
    grids = GRIDS if modality == "image" else VIDEO_GRIDS
    given, before = pictures_to_scale(grids, modality), []
    vision = tower_model("video_llama_3")[1].vision_model
    hook = vision.post_layernorm.register_forward_hook(lambda m, args, out: before.append(out))
    base, seen, weights, output = look("video_llama_3", modality, given)
    hook.remove()
    vision, merges = base.vision_model, given[f"{modality}_merge_sizes"]
    states = torch.cat([paid.mean((0, 1, 2))[:, None] for paid in weights])
    patches = patches_behind(
        lambda x: vision.pixel_unshuffle(x, torch.tensor(grids), merges), states
    )
    assert {len(square) for square in patches} == {1, 4}
    _, paid = means(states, states[:, 0], patches)
    frames = [
        h * w // merge**2
        for (t, h, w), merge in zip(grids, merges.tolist(), strict=True)
        for _ in range(t)
    ]
    assert_seen(seen, output.last_hidden_state.split(frames), paid.split(frames))
    assert in_order(seen) == len(torch.cat(output.pooler_output))


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"])
@pytest.mark.parametrize("modality", ["image", "video"])
def test_squares_of_minicpm_have_the_mean_of_what_the_last_layer_has(name, mode, modality):
    if name not in TOWER_MODELS:
        pytest.skip("not taken of this transformers")
    given = sliced_pictures(modality)
    sizes = given[f"target_sizes{'_videos' if modality == 'video' else ''}"]
    sizes = sizes if mode == "4x" else sizes // 2
    base, seen, weights, output = look(name, modality, given | {"downsample_mode": mode})
    states = output.last_hidden_state[0]
    patches = patches_behind(lambda x: torch.cat(base.merger(x[None], sizes)), states)
    received = torch.cat([paid.mean((0, 1, 2)) for paid in weights])
    features, paid = means(states, received, patches)
    counts = [len(rows) for rows in output.pooler_output]
    assert_seen(seen, features.split(counts), paid.split(counts))
    assert in_order(seen) == sum(counts) == int(sizes.prod(1).sum()) // 4


def test_a_token_of_got_is_what_its_convolutions_read():
    """Of a last layer that sees all; of one with windows nothing is known."""
    given, found = {"pixel_values": random(3, 3, 64, 64)}, []
    _, base, family = tower_model("got_ocr2")
    tower = PAGES[family].tower(base)
    tower.attentions[-1].register_forward_hook(lambda m, args, out: found.append(out[1]))
    watch = VisionWatch(base, tower, "attention", None)
    watch.attach()
    with torch.no_grad():
        output = base.get_image_features(**given, return_dict=True)
    watch.detach()
    seen, states = getattr(output, SEEN), output.last_hidden_state
    received = found[0].view(3, 2, 256, 256).mean((1, 2))

    def project(rows):
        return base.multi_modal_projector(rows.T.view(1, -1, 16, 16))

    patches = patches_behind(project, states[0].flatten(1).T)
    assert {len(square) for square in patches} == {16, 28, 49}  # of 7 x 7, less at the edges
    paid = torch.stack([torch.stack([x[square].mean() for square in patches]) for x in received])
    assert_seen(seen, output.pooler_output, paid)
    torch.testing.assert_close(seen.summary, output.pooler_output.mean(1))
    assert in_order(seen) == 48
    base.vision_tower.layers[-1].window_size = 4
    assert PAGES[family].tower(base) is None


@pytest.mark.parametrize("name, square", [("ovis2", 1), ("ovis2 squares", 4)])
def test_words_of_ovis_are_squares_of_patches(name, square):
    given = square_pictures()
    base, seen, weights, output = look(name, "image", given)
    vision = base.vision_tower
    with torch.no_grad():
        states = vision.transformer(given["pixel_values"]).last_hidden_state

    def fold(rows):
        with mock.patch.object(vision.transformer, "forward", lambda *_, **__: (rows[None],)):
            return vision(given["pixel_values"][:1]).last_hidden_state

    patches = patches_behind(fold, states[0])
    assert {len(rows) for rows in patches} == {square} and len(patches) * square == 16
    each = [means(*one, patches) for one in zip(states, from_all(weights), strict=True)]
    assert_seen(seen, [features for features, _ in each], [paid for _, paid in each])
    torch.testing.assert_close(seen.summary, states.mean(1))
    assert in_order(seen) == output.pooler_output.shape[:2].numel()


@pytest.mark.skipif("granite_docling" not in TOWER_MODELS, reason="not taken of this transformers")
@pytest.mark.parametrize("name", ["granite_docling", "granite_docling fine"])
def test_tokens_of_docling_are_squares_in_two_sizes(name):
    real = torch.tensor([[True, True], [True, False]])
    given = {"pixel_values": random(2, 2, 3, 56, 56), "pixel_attention_mask": real}
    fine = name.endswith("fine")
    if fine:
        given["tile_fine_mask"] = torch.ones(2, dtype=torch.bool)
    base, seen, weights, output = look(name, "image", given)
    states = output.last_hidden_state
    connector = base.vision_model.connector
    weights_of_channels = random(64)  # a norm leaves no sum of them

    def connect(rows):
        tokens, _ = connector(rows[None], [states[:1]] * 2, fine=fine)
        return tokens * weights_of_channels

    patches = patches_behind(connect, states[0])
    assert {len(square) for square in patches} == {1 if fine else 4}
    each = [means(*one, patches) for one in zip(states, from_all(weights), strict=True)]
    assert_seen(seen, [features for features, _ in each], [paid for _, paid in each])
    assert in_order(seen) == len(torch.cat(output.pooler_output)) == 3 * len(patches)


@pytest.mark.skipif("granite4_vision" not in TOWER_MODELS, reason="not taken of this transformers")
@pytest.mark.parametrize("name", ["granite4_vision", "granite4_vision windows"])
def test_a_token_of_granite_has_a_place_in_its_window(name):
    """The whole of it, or a quarter. Rows are told by their values."""
    given = anyres(torch.Generator().manual_seed(3), 1)
    projected = []
    _, base, _ = tower_model(name)
    hook = base.layerwise_projectors[0].register_forward_hook(
        lambda m, args, out: projected.append(out)
    )
    base, seen, weights, output = look(name, "image", given)
    hook.remove()
    states = output.hidden_states[-1]
    place = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    projector = base.layerwise_projectors[0]
    patches = patches_behind(lambda x: projector(x[None]), states[0, 1:])
    if name == "granite4_vision":
        assert torch.equal(torch.stack(patches), place)
    else:
        assert {len(square) for square in patches} == {16}
    assert_seen(seen, states[:, 1:][:, place].mean(2), from_cls(weights, 1)[:, place].mean(2))
    assert torch.equal(seen.summary, states[:, 0])
    rows = torch.cat(output.deepstack_features[0][1])
    newline = seen.shows < 0
    assert len(rows) == len(seen.shows) and 0 < newline.sum() < len(rows) / 2
    with torch.no_grad():
        rows_of_tokens = projector(output.hidden_states[-2][:, 1:]).flatten(0, 1)
    torch.testing.assert_close(rows[~newline], rows_of_tokens[seen.shows[~newline]])
    assert torch.equal(rows[newline], base.image_newline.expand(int(newline.sum()), -1))


def test_tokens_of_aria_have_what_the_patches_have_that_they_read():
    mask = torch.ones(3, 56, 56, dtype=torch.long)
    mask[1, 28:] = 0
    given, reads = square_pictures() | {"pixel_mask": mask}, []
    _, base, _ = tower_model("aria")
    asking = type(base.multi_modal_projector.cross_attn.multihead_attn)
    forward = asking.forward

    def note(*args, **kwargs):
        output = forward(*args, **kwargs)
        reads.append(output[1])
        return output

    with mock.patch.object(asking, "forward", note):
        base, seen, weights, output = look("aria", "image", given)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[1, 8:] = False
    received = torch.stack(list(from_all(weights, valid)))
    assert not reads[0][1, :, 8:].any() and reads[0].std() > 0.01
    assert_seen(seen, output.pooler_output, (reads[0] * received[:, None]).sum(2))
    torch.testing.assert_close(seen.summary, output.pooler_output.mean(1))
    assert in_order(seen) == 48


def test_tokens_of_idefics2_have_no_attention_of_patches():
    model, base, _ = tower_model("idefics2")
    watch = VisionWatch(base, PAGES["idefics2"].tower(base), "similarity", None)
    watch.attach()
    with torch.no_grad():
        output = base.get_image_features(**masked_pictures(), return_dict=True)
    watch.detach()
    seen = getattr(output, SEEN)
    rows = output.pooler_output
    features = (rows if isinstance(rows, torch.Tensor) else torch.cat(rows)).view(3, 8, 64)
    assert torch.equal(seen.features, features) and in_order(seen) == 24
    torch.testing.assert_close(seen.summary, features.mean(1))
    with pytest.raises(NotImplementedError, match="the vision tower for attention: its visual"):
        vtp.apply(model, vtp.InflectionPruning("attention", llm_layers=()))


@pytest.mark.skipif("video_llava" not in TOWER_MODELS, reason="not taken of this transformers")
@pytest.mark.parametrize("modality", ["image", "video"])
def test_video_llava_sees_pictures_as_llava_does(modality):
    """Frames too, by a tower of their own; the text gets CLS of each."""
    given = square_pictures() if modality == "image" else videos()
    _, seen, weights, output = look("video_llava", modality, given)
    hidden = output.hidden_states[-2]
    assert_seen(seen, hidden[:, 1:], from_cls(weights, 1))
    assert torch.equal(seen.summary, hidden[:, 0])
    if modality == "image":
        assert in_order(seen) == 48 == output.pooler_output.shape[:2].numel()
        return
    order = torch.arange(96).view(6, 16)
    assert torch.equal(seen.shows.view(6, 17)[:, 1:], order) and output.pooler_output.shape[1] == 17
    assert (seen.shows.view(6, 17)[:, 0] == -1).all()


def test_vipllava_is_scored_by_the_deepest_layer_it_takes():
    _, seen, weights, output = look("vipllava", "image", square_pictures())
    hidden = output.hidden_states[-1]
    assert_seen(seen, hidden[:, 1:], from_cls(weights, 1))
    assert in_order(seen) == 48 == output.pooler_output.shape[:2].numel()


WHOLE = {  # what makes rows of the tower's output
    "paligemma": "multi_modal_projector",
    "deepseek_vl": "aligner",
    "deepseek_vl_hybrid": "aligner",
    "janus": "aligner",
    "gemma3": "multi_modal_projector",
    "aya_vision": "multi_modal_projector",
    "cohere2_vision": "multi_modal_projector",
    "idefics3": "connector",
    "smolvlm": "connector",
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_have_the_mean_of_the_patches_that_they_show(name):
    """As the projector tells: of a token, whatever patches change it."""
    given, valid = square_pictures(), None
    if WHOLE[name] == "connector":
        given, valid = masked_pictures(), torch.ones(3, 16, dtype=torch.bool)
        valid[1, 8:] = False
    if name == "deepseek_vl_hybrid":
        given["high_res_pixel_values"] = random(3, 3, 128, 128)
    base, seen, weights, output = look(name, "image", given)
    states = output.hidden_states[-1] if name == "aya_vision" else output.last_hidden_state
    project = getattr(base, WHOLE[name])
    if name == "deepseek_vl_hybrid":  # of two towers
        larger = output.high_res_vision_last_hidden_state[:1]
        project = lambda x: base.aligner(x, larger)  # noqa: E731
    squares = patches_behind(lambda x: project(x[None]), states[0])
    features = [torch.stack([rows[square].mean(0) for square in squares]) for rows in states]
    paid = [
        torch.stack([rows[square].mean() for square in squares])
        for rows in from_all(weights, valid)
    ]
    assert_seen(seen, features, paid)
    torch.testing.assert_close(seen.summary, states.mean(1))
    rows = output.pooler_output
    assert in_order(seen) == sum(len(x.flatten(0, -2)) for x in rows) == 3 * len(squares)


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_frames_that_are_scaled_down_have_the_mean_of_what_is_put_together(name):
    _, seen, weights, output = look(name, "video", videos())
    has_cls = name == "llava_next_video"
    hidden = output.hidden_states[-2 if has_cls else -1]
    received = from_cls(weights, 1) if has_cls else from_all(weights)
    features = hidden[:, 1:] if has_cls else hidden
    frames, n, width = features.shape
    assert (frames, n) == (6, 16)
    features = features.view(6, 2, 2, 2, 2, width).mean((2, 4)).flatten(1, 2)
    assert_seen(seen, features, received.view(6, 2, 2, 2, 2).mean((2, 4)).flatten(1))
    torch.testing.assert_close(seen.summary, hidden[:, 0] if has_cls else hidden.mean(1))
    newline = [] if has_cls else [-1]
    assert seen.shows.tolist() == [*range(12), *newline, *range(12, 24), *newline]
    if ENCODES_FIRST:  # elsewhere the rows are put together later
        assert [len(rows) for rows in output.pooler_output] == [12 + len(newline)] * 2


@pytest.mark.parametrize(
    "name, given",
    [
        ("dinov3", square_pictures()),
        ("llava_pixtral", sized_pictures()),
        ("lfm2_vl", patched_pictures()),
        ("idefics3", masked_pictures()),
        ("qwen2_5_vl", packed_pictures(GRIDS, "image")),
    ],
)
def test_scores_do_not_depend_on_the_attention_implementation(name, given):
    """Which has its own form of masks."""
    seen = {kind: look(name, "image", given, kind)[1] for kind in ("eager", "sdpa")}
    torch.testing.assert_close(seen["sdpa"].attention, seen["eager"].attention, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name, prefix", [("registers", 4), ("dinov3", 3), ("llava_pixtral", 0)])
@pytest.mark.parametrize("source", ["similarity", "attention"])
def test_llava_keeps_what_comes_up_to_the_knee(name, prefix, source):
    """Of each picture, by the tower's own attention and states; registers have no score."""
    given = sized_pictures() if name == "llava_pixtral" else square_pictures()
    _, _, weights, output = look(name, "image", given)
    counts = [len(rows) for rows in output.pooler_output]
    if name == "llava_pixtral":
        states = output.last_hidden_state[0].split(PATCHES)
        curves = in_blocks(weights, PATCHES)
        summaries = [rows.mean(0) for rows in states]
    else:
        hidden = output.hidden_states[-2]
        states, curves, summaries = hidden[:, prefix:], from_cls(weights, prefix), hidden[:, 0]
    stays = []
    for count, rows, curve, summary in zip(counts, states, curves, summaries, strict=True):
        if source == "similarity":
            curve = torch.cosine_similarity(rows, summary[None], dim=-1)
        kept = knee(curve.tolist(), "chord", 2, None, 0.995, 0.9)
        others = count - len(curve)
        stays += [True] * others + [token in kept for token in range(len(curve))]
    model, *_ = tower_model(name)
    ids = torch.tensor([[1, *[IMAGE] * counts[0], 5, *[IMAGE] * sum(counts[1:]), 6, 7]])
    with vtp.prune(model, vtp.InflectionPruning(source, min_keep=2, llm_layers=())) as run:
        model(ids, **given)
    assert run.report().kept[0][ids == IMAGE].tolist() == stays
    assert len(counts) * (prefix + 1) < sum(stays) < len(stays)


def test_segments_of_all_lengths_at_once(draw):
    """Packed rows against one segment after the other; some have no rows."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31))
    lengths = [1, 40, 0, 3, 2, 17, 33, 16, 1]
    query, key = torch.randn(2, sum(lengths), 3, 8, generator=generator, dtype=torch.float64)
    received = received_in_segments(query, key, lengths, 0.3, "reference")
    expected = []
    for q, k in zip(query.split(lengths), key.split(lengths), strict=True):
        if len(q):
            weights = torch.einsum("mhd,shd->hms", q, k).mul(0.3).softmax(-1)
            expected.append(weights.mean((0, 1)))
    torch.testing.assert_close(received, torch.cat(expected))


def test_a_mask_that_is_no_tensor_is_refused():
    layers = IdeficsLayers(tower_model("idefics3")[1].vision_model)
    with pytest.raises(NotImplementedError, match="attention_mask: expected a tensor"):
        layers.valid({"attention_mask": object()}, {})


def test_a_vision_model_that_is_built_otherwise_is_not_known(monkeypatch):
    """Neither one of another kind, nor one whose attentions lack what they are known to have, or
    have more."""
    _, base, family = tower_model("dinov2")
    first, attention, _ = PAGES[family].tower(base).attentions
    first.q_norm = torch.nn.LayerNorm(8)
    assert PAGES[family].tower(base) is None
    del first.q_norm
    assert PAGES[family].tower(base) is not None
    delattr(attention, "q_proj" if hasattr(attention, "q_proj") else "query")
    assert PAGES[family].tower(base) is None
    monkeypatch.setattr(base.vision_tower.config, "model_type", "vit")
    assert PAGES[family].tower(base) is None
    _, base, family = tower_model("qwen2_5_vl")
    monkeypatch.delattr(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.get_vision_window_index"
    )
    assert PAGES[family].tower(base) is None
