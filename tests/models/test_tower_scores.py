"""What tokens get in every kind of vision tower: as the tower's own attention weights say."""

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
    sized_pictures,
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
)
PICTURES_ALONE = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "ernie4_5_vl_moe")
WINDOWS = ("qwen2_5_vl", "qwen2_5_omni_thinker", "hyperclovax_vision_v2")
PATCHES = [16, 12, 8]  # of the three pictures that have a size of their own


def look(name, modality, given, attention="eager"):
    """The model; what was seen; what the tower's own attention paid; what came out of it."""
    _, base, family = tower_model(name, attention)
    tower = PAGES[family].tower(base)
    watch = VisionWatch(base, tower, "attention", None)
    watch.attach()
    with torch.no_grad(), eager_weights(tower.scoring(given)) as weights:
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
        *((name, "image") for name in (*QWEN, *PICTURES_ALONE) if name in TOWER_MODELS),
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


@pytest.mark.skipif("video_llava" not in TOWER_MODELS, reason="not taken of this transformers")
def test_video_llava_sees_pictures_as_llava_does():
    _, seen, weights, output = look("video_llava", "image", square_pictures())
    assert_seen(seen, output.hidden_states[-2][:, 1:], from_cls(weights, 1))
    assert in_order(seen) == 48 == output.pooler_output.shape[:2].numel()


def test_vipllava_is_scored_by_the_deepest_layer_it_takes():
    _, seen, weights, output = look("vipllava", "image", square_pictures())
    hidden = output.hidden_states[-1]
    assert_seen(seen, hidden[:, 1:], from_cls(weights, 1))
    assert in_order(seen) == 48 == output.pooler_output.shape[:2].numel()


WHOLE = {  # what makes rows of the tower's output
    "paligemma": "multi_modal_projector",
    "deepseek_vl": "aligner",
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
    base, seen, weights, output = look(name, "image", given)
    states = output.hidden_states[-1] if name == "aya_vision" else output.last_hidden_state
    project = getattr(base, WHOLE[name])
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
