"""Every family, in short: what test_families.py shows at length of a few (and of all, given
--every-family) holds for each page of vtp_kernels.models.families."""

import pytest
import torch
from masked_reference import MaskedReference
from merged_rows import noting_content
from pruning_methods import IN_EVERY_FAMILY, SELECTORS, pruning_method
from test_generation import DETAILS, assert_same, next_turn
from tiny_llava import ENCODES_FIRST, prompt
from tiny_models import FAMILIES, IMAGE, VIDEO, windows

import vtp_kernels as vtp

GREEDY = {"max_new_tokens": 3, "do_sample": False}
PROMPTS = (((0,), 9), ((1, 2), 3), ((), 5))
PYRAMID = vtp.PyramidDrop((1, 3, 5), (0.5, 0.25, 0.0))
STAGES = {1: 0.5, 3: 0.25, 5: 0.0}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def models(family):
    return {kind: family.model(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def drawn(family, models):
    return family.draw(models["sdpa"], *PROMPTS)


@pytest.fixture(scope="module")
def inputs(family, models, drawn):
    return family.inputs(models["sdpa"], *drawn)


def test_keep_all_is_bit_identical(models, inputs):
    model = models["sdpa"]
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.Schedule({2: 1.0, 4: 1.0})):
        kept_all = model.generate(**inputs, **GREEDY, **DETAILS)
    removed = model.generate(**inputs, **GREEDY, **DETAILS)
    for output in (kept_all, removed):
        assert_same(output, untouched, tolerance=0)


def test_rows_leave_before_layer_0(models, inputs):
    with vtp.prune(models["sdpa"], vtp.RandomPruning(0, 0.25)) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert len(kept[0]) == len(PROMPTS) and not kept[0].all()
    with MaskedReference(models["eager"], {0: None}, given=kept):
        assert_same(pruned, models["eager"].generate(**inputs, **GREEDY, **DETAILS))


@pytest.mark.parametrize("score", ["last_token", "contribution"])
def test_rows_leave_early_and_to_nothing(models, inputs, score):
    method = PYRAMID if score == "last_token" else vtp.Schedule(STAGES, score=score)
    with vtp.prune(models["sdpa"], method) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(models["eager"], STAGES, score=score) as masked:
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    for layer in STAGES:
        assert torch.equal(kept[layer], masked.kept[layer]), f"layer {layer}"
    assert_same(pruned, reference)


def test_a_batch_is_its_prompts_one_by_one(family, models, drawn, inputs):
    model = models["sdpa"]
    with vtp.prune(model, PYRAMID):
        together = model.generate(**inputs, **GREEDY, **DETAILS)
        for b, one in enumerate(drawn):
            alone = model.generate(**family.inputs(model, one), **GREEDY, **DETAILS)
            for now, all_of_them in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(now[0], all_of_them[b], rtol=0, atol=5e-5)


def test_pictures_at_both_ends(family, models):
    """The last token is a picture's: it stays."""
    (_, (first,)), (_, (last,)) = family.draw(models["sdpa"], ((0,), 0), ((1,), 0))
    places = [family.placeholders(models["sdpa"], picture) for picture in (first, last)]
    ids = torch.cat((places[0], torch.tensor([5, 6, 7]), places[1]))
    inputs = family.inputs(models["sdpa"], (ids, [first, last]))
    with vtp.prune(models["sdpa"], PYRAMID) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert kept[5][0].sum() == 4 and kept[5][0, -1]
    with MaskedReference(models["eager"], STAGES, given=kept):
        assert_same(pruned, models["eager"].generate(**inputs, **GREEDY, **DETAILS))


@pytest.mark.skipif(not ENCODES_FIRST, reason="hands beams the wrong pictures, pruned or not")
def test_beams(family, models):
    """Transformers hands GLM's beams the wrong pictures where a prompt has more than one."""
    inputs = family.batch(models["sdpa"], ((0,), 9), ((1,), 3), ((), 5))
    settings = GREEDY | DETAILS | {"suppress_tokens": [IMAGE, VIDEO], "num_beams": 2}
    with vtp.prune(models["sdpa"], PYRAMID):
        pruned = models["sdpa"].generate(**inputs, **settings)
    with MaskedReference(models["eager"], STAGES):
        assert_same(pruned, models["eager"].generate(**inputs, **settings))


def test_static_cache(models, inputs):
    with vtp.prune(models["sdpa"], PYRAMID):
        expected = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
        static = {"cache_implementation": "static"}
        if any(windows(models["sdpa"])):
            with pytest.raises(NotImplementedError, match="StaticSlidingWindowLayer"):
                models["sdpa"].generate(**inputs, **GREEDY, **static)
            return
        assert_same(models["sdpa"].generate(**inputs, **GREEDY, **DETAILS, **static), expected)


def test_a_second_turn(family, models, inputs):
    turns = [prompt(0, n, seed=n) for n in (2, 5, 0)]
    settings = GREEDY | DETAILS | {"suppress_tokens": [IMAGE, VIDEO]}

    def talk(model):
        first = model.generate(**inputs, **settings)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        for name in family.types:
            added = more["input_ids"].shape[1] - inputs["input_ids"].shape[1]
            more[name] = torch.nn.functional.pad(inputs[name], (0, added))
        return model.generate(**more, past_key_values=first.past_key_values, **settings)

    with vtp.prune(models["sdpa"], PYRAMID):
        pruned = talk(models["sdpa"])
    with MaskedReference(models["eager"], STAGES):
        assert_same(pruned, talk(models["eager"]))


@pytest.mark.parametrize(
    "family",
    [name for name in FAMILIES if FAMILIES[name].tiny.video],
    indirect=True,
    scope="module",
)
def test_videos(family, models):
    """Frames, with timestamps between them where the family has these, beside pictures and text.
    GLM takes either pictures or videos."""
    alone = family.tiny.video.token == IMAGE
    mixed = ((0,),) if alone else (0, (0,), 2)
    drawn = family.draw(models["sdpa"], (mixed, 4), (((0,),), 9), ((), 5))
    inputs = family.inputs(models["sdpa"], *drawn)
    for method, stages in (
        (vtp.RandomPruning(0, 0.25), {0: None}),
        (PYRAMID, STAGES),
    ):
        with vtp.prune(models["sdpa"], method) as run:
            pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
        report = run.report()
        given = report.kept if 0 in stages else None
        with MaskedReference(models["eager"], stages, given=given) as masked:
            reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
        for layer, kept in report.kept.items():
            assert torch.equal(kept, masked.kept[layer])
        assert_same(pruned, reference)
    check_units(report, vtp.picture_grids(models["sdpa"], inputs))
    for method in (None, vtp.FrameDifference(0.25), vtp.VidCom2(0.4)):
        if method is not None:
            if any(len(frames) == 1 for frames in frames_of(models["sdpa"], inputs)):
                with pytest.raises(ValueError, match="expected videos of two frames or more"):
                    check_videos(models["sdpa"], inputs, method)
                continue
            report = check_videos(models["sdpa"], inputs, method)
        text = inputs["attention_mask"].bool() & ~report.kept.visual
        assert all((kept & text == text).all() for kept in report.kept.values())


def frames_of(model, inputs):
    """Of every video its grids."""
    videos = {}
    for grid in vtp.picture_grids(model, inputs):
        if grid.video is not None:
            videos.setdefault((grid.prompt, grid.video), []).append(grid)
    return videos.values()


@torch.no_grad()
def check_videos(model, inputs, method):
    """What shows the cells of frames leaves, and nothing else: its share of every video stays."""
    with vtp.prune(model, method) as run:
        model(**inputs, logits_to_keep=1)
    report, videos = run.report(), {}
    kept = report.kept.get(0, inputs["attention_mask"].bool())  # a video may be one frame
    for grid in vtp.picture_grids(model, inputs):
        shows = grid.columns[grid.views[0].tokens.flatten()]
        if grid.video is None:
            assert kept[grid.prompt, grid.columns].all()
            continue
        stays = kept[grid.prompt]
        assert stays[grid.columns].sum() - stays[shows].sum() == len(grid.columns) - len(shows)
        videos.setdefault(grid.video, []).append(stays[shows])
    for frames in videos.values():
        stays, number = torch.stack(frames), int(method.keep * sum(map(len, frames)) + 0.5)
        if isinstance(method, vtp.VidCom2):
            assert stays.sum() == max(number, len(frames)) and stays.any(1).all()
        else:
            assert stays.sum() == max(number, len(frames[0])) and stays[0].all()
    return report


@torch.no_grad()
def test_tokens_that_differ(models, inputs):
    """Those rows of each picture (of the prompt, where the family does not tell) that differ most
    as they enter the language model."""
    model, seen = models["sdpa"], {}

    def look(module, args, kwargs):
        seen.setdefault("rows", args[0] if args else kwargs["hidden_states"])

    hook = model.get_decoder().layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with vtp.prune(model, vtp.Schedule({})) as run:
        model(**inputs, logits_to_keep=1)
        visual = run.report().kept.visual
    hook.remove()
    try:
        groups = [(grid.prompt, grid.columns) for grid in vtp.picture_grids(model, inputs)]
    except NotImplementedError:
        groups = [(b, row.nonzero()[:, 0]) for b, row in enumerate(visual) if row.any()]
    per = "image" if len(groups) > 2 else "prompt"
    with vtp.prune(model, vtp.DivPrune(0.25, per)) as run:
        model(**inputs, logits_to_keep=1)
    kept = run.report().kept[0]
    for b, columns in groups:
        count = int(0.25 * len(columns) + 0.5)
        expected = vtp.select_diverse(seen["rows"][b, columns][None], count).indices[0]
        assert kept[b, columns].nonzero()[:, 0].tolist() == expected.tolist()


def check_units(report, grids):
    """What a report tells of pictures and frames is what their grids do."""
    assert report.units and len(report.units) == len(grids)
    visual = torch.zeros_like(report.kept.visual)
    for unit, grid in zip(report.units, grids, strict=True):
        visual[grid.prompt, grid.columns] = True
        assert unit["prompt"] == grid.prompt and unit["tokens"] == len(grid.columns)
        assert unit.get("frames") == (None if grid.frames is None else list(grid.frames))
        for layer, kept in report.kept.items():
            assert unit["kept"][layer] == kept[grid.prompt, grid.columns].sum()
    assert torch.equal(visual, report.kept.visual)


def test_every_method(models, inputs, tmp_path):
    """Who stays is taken over from the method's own report."""
    short = DETAILS | {"max_new_tokens": 2, "do_sample": False}
    for name in IN_EVERY_FAMILY:
        method = pruning_method(name, models["sdpa"], tmp_path / name)
        with vtp.prune(models["sdpa"], method) as run:
            pruned = models["sdpa"].generate(**inputs, **short)
        kept = run.report().kept
        with MaskedReference(models["eager"], dict.fromkeys(kept), given=kept):
            assert_same(pruned, models["eager"].generate(**inputs, **short))


@torch.no_grad()
def test_every_selector(family, models, inputs, tmp_path):
    """The same, and what was merged, of one call; those that need the vision tower are refused
    where it is not known."""
    known = vtp.supported_models()[family.page.name]["methods"]
    for name in SELECTORS:
        method = pruning_method(name, models["sdpa"], tmp_path)
        if name not in known:
            with pytest.raises(NotImplementedError, match=r"cannot run .*vision tower"):
                vtp.apply(models["sdpa"], method)
            continue
        with noting_content() as content, vtp.prune(models["sdpa"], method) as run:
            pruned = models["sdpa"](**inputs, logits_to_keep=1).logits
        kept = run.report().kept
        assert not kept[0 if 0 in kept else 2][kept.visual].all()
        with MaskedReference(models["eager"], dict.fromkeys(kept), given=kept, content=content):
            masked = models["eager"](**inputs, logits_to_keep=1).logits
        torch.testing.assert_close(pruned[:, -1:], masked[:, -1:], rtol=0, atol=2e-5)


# --- passive visual tokens, in each family's attention --------------------------------------------


@pytest.mark.parametrize("way", ["exact", "skip"])
@torch.no_grad()
def test_passive_attention(family, models, inputs, way):
    """Of the weights that the eager attention computed, the published code leaves these."""
    method = vtp.VisiPruner(("shallow",), shallow_layers=1, shallow_attention=way)
    if family.refuses_passive(models["sdpa"], 1):
        with pytest.raises(NotImplementedError, match="passive"):
            vtp.prune(models["sdpa"], method)
        return
    model, seen = models["eager"], {}
    attention = model.get_decoder().layers[0].self_attn

    def look(module, args, kwargs, output):
        seen.update(hidden=kwargs["hidden_states"], weights=output[1])

    hook = attention.register_forward_hook(look, with_kwargs=True)
    model(**inputs)
    hook.remove()
    passive = {}

    def look_again(module, args, kwargs, output):
        passive["output"] = output[0]

    with vtp.prune(models["sdpa"], method):
        stand_in = models["sdpa"].get_decoder().layers[0].self_attn
        hook = stand_in.register_forward_hook(look_again, with_kwargs=True)
        models["sdpa"](**inputs)
        hook.remove()
    hidden, real = seen["hidden"], inputs["attention_mask"].bool()
    value = attention.v_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
    value = value.repeat_interleave(seen["weights"].shape[1] // value.shape[1], dim=1)
    weights = torch.stack(
        [
            passive_weights(w, ids == IMAGE, way)
            for w, ids in zip(seen["weights"], inputs["input_ids"], strict=True)
        ]
    )
    expected = attention.o_proj((weights @ value).transpose(1, 2).reshape(*hidden.shape[:2], -1))
    torch.testing.assert_close(passive["output"][real], expected[real], rtol=0, atol=2e-5)


def passive_weights(weights, visual, way):
    """[H, S, S] of one prompt: what is left in layer 0 of weights whose rows add up to 1."""
    if not visual.any():
        return weights
    weights, first = weights.clone(), int(visual.nonzero()[0])
    text = ~visual
    mass = weights[:, :, visual].sum(-1)
    sink = weights[:, :, first].clone()
    weights[:, :, visual] = 0
    if way == "exact":
        weights[:, text, first] = mass[:, text]
        return weights
    weights[:, :, first] = sink
    weights[:, visual] = 0
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
