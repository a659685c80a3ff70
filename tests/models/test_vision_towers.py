"""Whose token is in which row, family by family: against the projector's output, found by value."""

import inspect
import itertools

import pytest
import torch
from inflection_reference import knee
from masked_reference import MaskedReference
from PIL import Image
from tiny_llava import ENCODES_FIRST, IMAGE
from tiny_models import ALL, FAMILIES, VIDEO, words
from tower_reference import eager_weights, from_all, in_segments

import vtp_kernels as vtp
from near_ties import until_clear
from vtp_kernels.models.pictures.watch import SEEN, VisionWatch
from vtp_kernels.models.towers.crops import ResizedTower

SEEING = ("llava_next", "llava_onevision", "internvl", "qwen2_5_vl")
SOURCES = ("similarity", "attention")
GREEDY = {"max_new_tokens": 5, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=SEEING)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models(name):
    return {kind: FAMILIES[name].model(kind) for kind in ("sdpa", "eager")}


def inputs_of(name, model, *prompts):
    return FAMILIES[name].batch(model, *prompts)


GIVEN = {
    "image": ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def encode(model, inputs, modality="image"):
    pixels = inputs[GIVEN[modality][0]]
    given = {key: inputs[key] for key in GIVEN[modality][1:] if key in inputs}
    # The pixels of videos have different names in different versions.
    return getattr(model.model, f"get_{modality}_features")(pixels, **given, return_dict=True)


def qwen_curves(model, inputs, source, modality):
    """Of each row, its picture or frame and its score."""
    visual = model.model.visual
    with eager_weights(visual.blocks[-1].attn) as weights:
        output = encode(model, inputs, modality)
    rows = torch.cat(output.pooler_output)
    received = in_segments(weights, visual.merger(output.last_hidden_state), rows)
    grids = inputs[f"{modality}_grid_thw"].tolist()
    lengths = [h * w // 4 for t, h, w in grids for _ in range(t)]
    curves = []
    for number, (tokens, scores) in enumerate(
        zip(rows.split(lengths), received.split(lengths), strict=True)
    ):
        if source == "similarity":
            scores = torch.cosine_similarity(tokens, tokens.mean(0, keepdim=True), dim=-1)
        curves += [(number, score) for score in scores.tolist()]
    return curves


def onevision_video_curves(model, inputs, source):
    """Of each row of a video, 2 x 2 tokens of the tower, its frame and score; None for the row
    behind them all."""
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    with eager_weights(layers[-1].self_attn) as weights:
        output = encode(model, inputs, "video")
    hidden = output.hidden_states[-1]
    scores = from_all(weights)
    squares = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    if source == "similarity":
        pooled = hidden[:, squares].mean(2)
        scores = torch.cosine_similarity(pooled, hidden.mean(1, keepdim=True), dim=-1)
    else:
        scores = scores[:, squares].mean(2)
    (frames,) = scores.chunk(len(inputs["pixel_values_videos"]))  # of the one video
    return [*((i, x) for i, row in enumerate(frames.tolist()) for x in row), None]


@torch.no_grad()
def curves_by_value(name, model, inputs, source):
    """For each row of image features, in order: its curve's number and its score; None for rows
    that show nothing of the tower's. Found by looking for the row among the projector's outputs."""
    base, seen = model.model, {}
    if name == "qwen2_5_vl":
        return qwen_curves(model, inputs, source, "image")
    hooks = [
        base.multi_modal_projector.register_forward_hook(
            lambda module, args, output: seen.update(projected=output)
        ),
        base.vision_tower.register_forward_hook(
            lambda module, args, output: seen.update(tower=output)
        ),
    ]
    layers = getattr(base.vision_tower, "vision_model", base.vision_tower).encoder
    layers = layers.layer if name == "internvl" else layers.layers
    states = []
    for layer in layers:
        attention = layer.attention if name == "internvl" else layer.self_attn
        hooks.append(
            attention.register_forward_pre_hook(
                lambda module, args, kwargs: states.append(
                    (module, args[0] if args else kwargs["hidden_states"])
                ),
                with_kwargs=True,
            )
        )
    rows = torch.cat(list(encode(model, inputs).pooler_output))
    for hook in hooks:
        hook.remove()
    layer = model.config.vision_feature_layer % (len(layers) + 1)
    hidden = seen["tower"].hidden_states[layer]
    if name == "internvl":
        hidden = seen["tower"].last_hidden_state
    has_cls = name != "llava_onevision"
    if source == "similarity":
        summary = hidden[:, :1] if has_cls else hidden.mean(1, keepdim=True)
        scores = torch.cosine_similarity(hidden, summary, dim=-1)
    else:
        attention, x = states[layer - 1]
        query, key = (
            p(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj)
        )
        weights = (query @ key.transpose(2, 3) * 8**-0.5).softmax(-1)
        scores = weights[:, :, 0].mean(1) if has_cls else weights.mean((1, 2))
    scores = scores[:, 1:] if has_cls else scores
    if name == "internvl":
        patches = model.model.pixel_shuffle(
            torch.arange(64).view(1, 8, 8, 1).double(), scale_factor=0.5
        )
        patches = patches.reshape(16, 4).long()
        vectors = hidden[:, 1:]
        if source == "similarity":
            scores = torch.cosine_similarity(vectors[:, patches].mean(2), hidden[:, :1], dim=-1)
        else:
            scores = scores[:, patches].mean(2)
    found = []
    projected = seen["projected"]
    for row in rows:
        match = (projected == row).all(-1).nonzero()
        found.append((int(match[0, 0]), float(scores[tuple(match[0])])) if len(match) else None)
    return found


def expected_rows(curves, per_curve, **rule):
    """Which of the rows of image features stay, given their curve and score."""
    stays = []
    for number, score in [c or (None, None) for c in curves]:
        if number is None:
            stays.append(True)
            continue
        whole = per_curve[number]
        kept = knee(whole, rule.get("rule", "chord"), rule.get("min_keep", 1), None, 0.995, 0.9)
        worst = min(whole[i] for i in kept)
        stays.append(score >= worst - 1e-6)
    return stays


@torch.no_grad()
def test_every_crop_has_a_curve_of_its_own(name, models):
    """The rows that stay are those whose tokens come up to the knee of their crop's curve, and all
    that show no token; in a batch, with two pictures of different sizes in a prompt."""
    model = models["sdpa"]
    inputs = inputs_of(name, model, ([0, 1], 3), ([2], 6), ([], 4))
    placeholders = inputs["input_ids"] == IMAGE
    for source in SOURCES:
        curves = curves_by_value(name, models["eager"], inputs, source)
        assert len(curves) == int(placeholders.sum())
        method = vtp.InflectionPruning(source, llm_layers=())
        with vtp.prune(model, method) as run:
            model(**inputs)
            report = run.report()
        [event] = [e for e in report.events if e["event"] == "inflection"]
        # All scores of a crop, padding that the model takes away included, decide about its knee.
        whole = all_scores(name, model, inputs, source)
        assert event["tokens"] == [len(curve) for curve in whole]
        stays = expected_rows(curves, whole)
        assert report.kept[0][placeholders].tolist() == stays
        assert 0 < sum(stays) < len(stays)
        newlines = sum(curve is None for curve in curves)
        assert (newlines > 0) == (name in ("llava_next", "llava_onevision"))


@torch.no_grad()
def all_scores(name, model, inputs, source):
    """Of every crop, the scores of all its tokens."""
    base = model.model
    seen = []
    watch = vtp.InflectionPruning(source, llm_layers=())

    class Watch(type(watch)):
        def decide(self, layer, rows):
            seen.append(rows.vision.inflection(source)[1])
            return super().decide(layer, rows)

    with vtp.prune(model, Watch(source, llm_layers=())):
        model(**inputs)
    assert base is model.model
    return [[x for x in row if x == x] for row in seen[0].tolist()]


@pytest.mark.parametrize("max_keep", [None, 5])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generates_as_the_masked_reference(name, models, attention, max_keep):
    inputs = inputs_of(name, models["sdpa"], ([0, 1], 3), ([2], 6), ([], 4))
    for source in SOURCES:
        method = vtp.InflectionPruning(source, max_keep=max_keep, llm_layers=(2, 4))
        with vtp.prune(models[attention], method) as run:
            pruned = models[attention].generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        with MaskedReference(models["eager"], dict.fromkeys(kept), given=kept):
            reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
        assert torch.equal(pruned.sequences, reference.sequences)
        for a, b in zip(pruned.logits, reference.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_beams_see_their_own_pictures(name, models):
    inputs = inputs_of(name, models["sdpa"], ([0], 3), ([2], 6))
    with vtp.prune(models["sdpa"], vtp.InflectionPruning(llm_layers=(2,))) as run:
        models["sdpa"].generate(**inputs, **GREEDY)
        kept = run.report().kept
        models["sdpa"].generate(**inputs, **GREEDY, num_beams=3)
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer].repeat_interleave(3, dim=0))


# --- videos -------------------------------------------------------------------------------------


def mixed(name, model):
    """A prompt with a video of three frames before a picture, and one with a picture alone."""
    generator = torch.Generator().manual_seed(9)
    tiny = FAMILIES[name]
    pictures = [tiny.picture(generator, index) for index in (1, 2)]
    if name == "qwen2_5_vl":
        video = {
            "pixel_values_videos": torch.randn(3 * 32, 96, generator=generator),
            "video_grid_thw": torch.tensor([[3, 8, 4]]),
        }
        length = 24
    else:
        video = {"pixel_values_videos": torch.randn(1, 3, 3, 56, 56, generator=generator)}
        length = 13
    first, second = (torch.full((tiny.tokens(model, p),), IMAGE) for p in pictures)
    begin, w = torch.tensor([1]), lambda n: words(n, generator)
    long = torch.cat((begin, w(2), torch.full((length,), VIDEO), w(2), first, w(3)))
    short = torch.cat((begin, w(1), second, w(4)))
    prompts = long, short
    pads = [max(map(len, prompts)) - len(ids) for ids in prompts]
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(p, (n, 0)) for p, n in zip(prompts, pads, strict=True)])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.stack([(torch.arange(ids.shape[1]) >= n).long() for n in pads]),
        **{key: torch.cat([p[key] for p in pictures]) for key in pictures[0]},
        **video,
    }
    if tiny.types:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("video_of", ["qwen2_5_vl", "llava_onevision"])
def test_frames_are_pictures_beside_pictures(video_of, source):
    """Each frame up to its own knee, in a prompt that has a picture too, and in one without."""
    sdpa, eager = (FAMILIES[video_of].model(kind) for kind in ("sdpa", "eager"))
    inputs = mixed(video_of, sdpa)
    if video_of == "qwen2_5_vl":
        frames = qwen_curves(eager, inputs, source, "video")
    else:
        frames = onevision_video_curves(eager, inputs, source)
    pictures = curves_by_value(video_of, eager, inputs, source)
    whole = all_scores(video_of, sdpa, inputs, source)
    per_frame = [[c[1] for c in frames if c and c[0] == i] for i in range(3)]
    torch.testing.assert_close(whole[-3:], per_frame, rtol=0, atol=1e-6)
    stays = expected_rows(frames, per_frame)
    assert 3 <= sum(stays) < len(stays)
    ids = inputs["input_ids"]
    method = vtp.InflectionPruning(source, llm_layers=())
    with vtp.prune(sdpa, method) as run:
        sdpa(**inputs)
        kept = run.report().kept[0]
        assert kept[ids == VIDEO].tolist() == stays
        assert kept[ids == IMAGE].tolist() == expected_rows(pictures, whole[:-3])
        # The prompt with the video, without its picture and padding.
        first = ids[:1, (ids[0] != IMAGE) & (ids[0] != 0)]
        alone = {key: inputs[key] for key in GIVEN["video"] if key in inputs}
        if FAMILIES[video_of].types:
            alone["mm_token_type_ids"] = 2 * (first == VIDEO).int()
        sdpa(first, **alone)
        assert run.report().kept[0][first == VIDEO].tolist() == stays


@pytest.mark.parametrize("video_of", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("max_keep", [None, 3])
def test_generates_from_videos_as_the_masked_reference(video_of, max_keep):
    sdpa, eager = (FAMILIES[video_of].model(kind) for kind in ("sdpa", "eager"))
    inputs = mixed(video_of, sdpa)
    method = vtp.InflectionPruning("attention", max_keep=max_keep, llm_layers=(2,))
    with vtp.prune(sdpa, method) as run:
        pruned = sdpa.generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        if ENCODES_FIRST:  # others hand beams the wrong pictures
            sdpa.generate(**inputs, **GREEDY, num_beams=2)
            for layer, mask in run.report().kept.items():
                assert torch.equal(mask, kept[layer].repeat_interleave(2, dim=0))
    with MaskedReference(eager, dict.fromkeys(kept), given=kept):
        reference = eager.generate(**inputs, **GREEDY, **DETAILS)
    assert torch.equal(pruned.sequences, reference.sequences)
    for a, b in zip(pruned.logits, reference.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_videos_of_which_nothing_is_known_are_refused(monkeypatch):
    model = FAMILIES["llava_onevision"].model("sdpa")
    inputs = mixed("llava_onevision", model)
    monkeypatch.setattr(ResizedTower, "videos", False)
    with vtp.prune(model, vtp.InflectionPruning(llm_layers=())):
        with pytest.raises(NotImplementedError, match="pixel_values_videos: what the vision tower"):
            model(**inputs)


# --- towers without a curve of their own above ----------------------------------------------------

PICTURES = (
    "got_ocr2",
    "ovis2",
    "aria",
    "idefics2",
    "granite_docling",
    "granite4_vision",
    "video_llama_3",
    "deepseek_vl_hybrid",
    "minicpmv4_6",
    "minicpmv4_7",
    "exaone4_5",
)
VIDEOS = ("glm4v", "ernie4_5_vl_moe", "video_llava", "video_llama_3", "minicpmv4_6", "exaone4_5")


def seen_alone(family, model, inputs, modality, source):
    """What a watch sees of the pictures, or videos, that the model is asked to encode."""
    base = family.page.base(model)
    watch = VisionWatch(base, family.page.tower(base), source, None)
    encode = getattr(base, f"get_{modality}_features")
    known = inspect.signature(encode).parameters
    watch.attach()
    output = getattr(base, encode.__name__)(
        **{name: inputs[name] for name in known if name in inputs}, return_dict=True
    )
    watch.detach()
    return getattr(output, SEEN)


def heads_of_curves(seen, source):
    """bool [T]: which of the tokens of all pictures come up to the knee, found one by one."""
    heads = []
    for index, features in enumerate(seen.features):
        if source == "similarity":
            curve = torch.cosine_similarity(features, seen.summary[index, None], dim=-1)
        else:
            curve = seen.attention[index]
        here = len(curve) if seen.here is None else int(seen.here[index].sum())
        kept = knee(curve[:here].tolist(), "chord", 1, None, 0.995, 0.9)
        heads += [token in kept for token in range(len(curve))]
    return torch.tensor(heads)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, modality",
    [*((name, "image") for name in PICTURES), *((name, "video") for name in VIDEOS)],
)
def test_rows_stay_that_show_the_head_of_a_curve(name, modality):
    """In a batch: of each picture or frame, and all rows that show no token."""
    if name not in ALL:
        pytest.skip("not taken of this transformers")
    family = ALL[name]
    model, source = family.model("sdpa"), "similarity" if name == "idefics2" else "attention"
    shown = ((0,), (2, 1)) if modality == "image" else (((0,),), ((0,), (0,)))
    seeds = itertools.count()

    def check():
        inputs = family.batch(model, (shown[0], 4), (shown[1], 2), ((), 3), seed=next(seeds))
        seen = seen_alone(family, model, inputs, modality, source)
        stays = torch.cat((heads_of_curves(seen, source), torch.tensor([True])))[seen.shows]
        with vtp.prune(model, vtp.InflectionPruning(source, llm_layers=())) as run:
            model(**inputs)
            in_call = run.report().kept
            model.generate(**inputs, **GREEDY | {"max_new_tokens": 1})
            before = run.report().kept
        assert torch.equal(in_call[0][in_call.visual], stays) and 0 < stays.sum() < len(stays)
        assert torch.equal(before[0], in_call[0])

    until_clear(check)


@torch.no_grad()
def test_tokens_that_videollama_leaves_out():
    """Of frames that are as those before: the text gets the others, with what was seen of them."""
    family = FAMILIES["video_llama_3"]
    model = family.model("sdpa")
    (_, (video,)), _ = family.draw(model, (((0,),), 0), ((), 0))
    mask = torch.ones(16, dtype=torch.bool)
    mask[9:14] = False  # of the second of two frames of eight tokens
    video["video_compression_mask"] = mask
    ids = torch.tensor([1, 60, 61, *[VIDEO] * 8, 60, 61, *[VIDEO] * 3, 5, 6])
    inputs = family.inputs(model, (ids, [video]), (torch.tensor([1, 5, 6]), []))
    for source in SOURCES:
        seen = seen_alone(family, model, inputs, "video", source)
        stays = heads_of_curves(seen, source)[mask]
        with vtp.prune(model, vtp.InflectionPruning(source, llm_layers=())) as run:
            model(**inputs)
        report = run.report()
        assert torch.equal(report.kept[0][report.kept.visual], stays) and not stays.all()
    assert [(unit["frames"], unit["tokens"]) for unit in report.units] == [([0], 8), ([1], 3)]
    grids = vtp.picture_grids(model, inputs)
    assert [len(grid.views) for grid in grids] == [1, 0]
    with pytest.raises(NotImplementedError, match="number 1 in the prompt is a video, and of some"):
        vtp.plot.tokens([[Image.new("RGB", (8, 8))] * 2], report, grids=grids)
