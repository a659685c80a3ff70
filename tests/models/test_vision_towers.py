"""Whose token is in which row, family by family: against the projector's output, found by value."""

import pytest
import torch
from inflection_reference import knee
from masked_reference import MaskedReference
from tiny_llava import IMAGE
from tiny_models import FAMILIES

import vtp_kernels as vtp

SEEING = ("llava_next", "llava_onevision", "internvl", "qwen2_5_vl")
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


def sources(name):
    return ("similarity",) if name == "qwen2_5_vl" else ("similarity", "attention")


def encode(model, inputs):
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    given = {key: inputs[key] for key in names if key in inputs}
    return model.model.get_image_features(**given, return_dict=True)


@torch.no_grad()
def curves_by_value(name, model, inputs, source):
    """For each row of image features, in order: its curve's number and its score; None for rows
    that show nothing of the tower's. Found by looking for the row among the projector's outputs."""
    base, seen = model.model, {}
    if name == "qwen2_5_vl":
        pictures = encode(model, inputs).pooler_output
        return [
            (i, float(torch.cosine_similarity(row, picture.mean(0), dim=0)))
            for i, picture in enumerate(pictures)
            for row in picture
        ]
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
    for source in sources(name):
        curves = curves_by_value(name, model, inputs, source)
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
    for source in sources(name):
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


def test_videos_are_refused():
    model = FAMILIES["llava_onevision"].model("sdpa")
    ids = torch.tensor([[1, *[98] * 17, 5, 6]])
    videos = torch.randn(1, 4, 3, 56, 56)
    with vtp.prune(model, vtp.InflectionPruning(llm_layers=())):
        with pytest.raises(NotImplementedError, match="pixel_values_videos: what the vision tower"):
            model(input_ids=ids, pixel_values_videos=videos)
