"""Families at length: pruned equals a reference in which nothing leaves and pruned keys are masked.

The families that differ most from each other; given --every-family, all of them. What is shorter is
in test_every_family.py.
"""

import pytest
import torch
from compiled_decoding import Graphs, compiled_decoding
from masked_reference import MaskedReference
from pruning_methods import NAMES, ONLY_ROWS_LEAVE, SELECTORS, pruning_method
from test_generation import DETAILS, GREEDY, assert_same, leave_out_endings, next_turn
from tiny_llava import ENCODES_FIRST, IMAGE, prompt
from tiny_models import ALL, FAMILIES, VIDEO, windows

import vtp_kernels as vtp
from vtp_kernels.models.families import parts_of

DEPTH = 6
METHODS = {
    "fastv": (vtp.FastV(2, 0.5), {2: 0.5}, "last_token"),
    "pyramid": (
        vtp.PyramidDrop((1, 3, 5), (0.5, 0.25, 0.0)),  # from among Qwen3-VL's deepstack layers
        {1: 0.5, 3: 0.25, 5: 0.0},
        "last_token",
    ),
    "text": (vtp.Schedule({2: 0.4, 3: 3}, score="text"), {2: 0.4, 3: 3}, "text"),
    "contribution": (
        vtp.Schedule({3: 0.5, 4: 3}, score="contribution"),
        {3: 0.5, 4: 3},
        "contribution",
    ),
}
BATCHES = {
    "one": (((0,), 9),),
    "padded": (((0,), 9), ((1, 2), 3), ((2, 0, 1), 6), ((), 5)),
}


# Crops and newlines; norms of queries and keys; positions of three numbers, and deepstack.
THOSE_THAT_DIFFER_MOST = ("llava_next", "internvl_qwen3", "qwen3_vl")


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_family")
        names = FAMILIES if every else THOSE_THAT_DIFFER_MOST
        metafunc.parametrize("family", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def models(family):
    return {kind: family.model(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module", params=BATCHES)
def inputs(request, family, models):
    return family.batch(models["sdpa"], *BATCHES[request.param])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_greedy(models, inputs, name, attention):
    method, stages, score = METHODS[name]
    with vtp.prune(models[attention], method) as run:
        pruned = models[attention].generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(models["eager"], stages, score=score) as masked:
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert kept.keys() == masked.kept.keys()
    for layer in kept:
        assert torch.equal(kept[layer], masked.kept[layer]), f"layer {layer}"
    assert_same(pruned, reference)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ONLY_ROWS_LEAVE)
def test_rows_that_leave_are_as_if_masked(models, inputs, name, attention, tmp_path):
    """Who stays is taken over from the method's own report."""
    method = pruning_method(name, models["sdpa"], tmp_path)
    with vtp.prune(models[attention], method) as run:
        pruned = models[attention].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert kept and any(not torch.equal(k, inputs["attention_mask"].bool()) for k in kept.values())
    with MaskedReference(models["eager"], dict.fromkeys(kept), given=kept):
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    assert_same(pruned, reference)


PYRAMID = vtp.PyramidDrop((2, 4), (0.5, 0.25))


@pytest.mark.skipif(not ENCODES_FIRST, reason="hands beams the wrong pictures, pruned or not")
def test_beams(family, models, request):
    if request.node.callspec.params["family"].startswith(("glm", "granite4")):
        pytest.skip("transformers hands its beams the wrong pictures, pruned or not")
    inputs = family.batch(models["sdpa"], *BATCHES["padded"])
    settings = GREEDY | DETAILS | {"num_beams": 2}
    with vtp.prune(models["sdpa"], PYRAMID):
        pruned = models["sdpa"].generate(**inputs, **settings)
    with MaskedReference(models["eager"], {2: 0.5, 4: 0.25}):
        reference = models["eager"].generate(**inputs, **settings)
    assert torch.equal(pruned.sequences, reference.sequences)


@pytest.mark.skipif(not ENCODES_FIRST, reason="hands samples the wrong pictures, pruned or not")
def test_sampling(family, models):
    inputs = family.batch(models["sdpa"], *BATCHES["padded"])
    settings = GREEDY | DETAILS | {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(11)
    with vtp.prune(models["sdpa"], PYRAMID):
        pruned = models["sdpa"].generate(**inputs, **settings)
    torch.manual_seed(11)
    with MaskedReference(models["eager"], {2: 0.5, 4: 0.25}):
        assert_same(pruned, models["eager"].generate(**inputs, **settings))


WAYS = {
    "assistant": lambda family: {"assistant_model": family.model("sdpa", seed=5)},
    "lookup": lambda family: {"prompt_lookup_num_tokens": 4},
    "static": lambda family: {"cache_implementation": "static"},
    "compiled": lambda family: compiled_decoding(),
    "without a cache": lambda family: {"use_cache": False, "max_new_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(family, models, way):
    """Each says what plain greedy decoding says."""
    drafts = way in ("assistant", "lookup")
    if way in ("static", "compiled") and any(windows(models["sdpa"])):
        pytest.skip("refused, as test_every_family.py shows")
    if drafts and family.page.may_be_acausal:
        pytest.skip("transformers takes drafts for rows of the prompt, pruned or not")
    if (drafts or way == "without a cache") and family.page.row_arguments:
        pytest.skip("transformers tells it of the prompt's rows alone, pruned or not")
    inputs = family.batch(models["sdpa"], *BATCHES["one" if drafts else "padded"])
    plain = GREEDY | DETAILS | {"suppress_tokens": [IMAGE, VIDEO]}
    if drafts and not models["sdpa"]._supports_logits_to_keep():
        message = "drafts come with the prompt, .* is not told how many"
        with vtp.prune(models["sdpa"], PYRAMID), pytest.raises(NotImplementedError, match=message):
            models["sdpa"].generate(**inputs, **plain | WAYS[way](family))
        return
    settings, graphs = WAYS[way](family), Graphs()
    with vtp.prune(models["sdpa"], PYRAMID) as run:
        expected = models["sdpa"].generate(**inputs, **plain)
        kept = run.report().kept
        output = models["sdpa"].generate(**inputs, **plain | settings)
        if way == "without a cache":  # each step is a prompt of its own
            torch.testing.assert_close(output.logits[0], expected.logits[0], rtol=0, atol=2e-5)
            return
        for layer, mask in run.report().kept.items():  # drafts come behind
            assert torch.equal(mask[:, : kept[layer].shape[1]], kept[layer])
    assert_same(output, expected)
    assert len(graphs) == (way == "compiled")


def test_inputs_embeds(family, models):
    model, seen = models["sdpa"], {}
    inputs = family.batch(model, *BATCHES["padded"])
    note = lambda module, args, kwargs: seen.update(kwargs)  # noqa: E731
    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
    hook.remove()
    with vtp.prune(model, PYRAMID) as run, torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits
        kept = run.report().kept
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        # Without ids no model knows where its pictures' rows and columns are.
        logits = model(**inputs, position_ids=seen["position_ids"], logits_to_keep=1).logits
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("early", [False, True])
def test_a_further_turn_of_text(family, models, early):
    """Where answers ended early, the next turn leaves out what filled them up."""
    inputs = family.batch(models["sdpa"], *BATCHES["padded"])
    turns = [prompt(0, n, seed=n) for n in (2, 5, 0, 7)]
    settings = GREEDY | DETAILS | {"suppress_tokens": [IMAGE, VIDEO]}

    def talk(model):
        first = model.generate(**inputs, **settings)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        if early:
            leave_out_endings(more["attention_mask"], inputs["input_ids"].shape[1])
        for name in family.types:
            added = more["input_ids"].shape[1] - inputs[name].shape[1]
            more[name] = torch.nn.functional.pad(inputs[name], (0, added))
        return model.generate(**more, past_key_values=first.past_key_values, **settings)

    with vtp.prune(models["sdpa"], PYRAMID):
        pruned = talk(models["sdpa"])
    with MaskedReference(models["eager"], {2: 0.5, 4: 0.25}):
        assert_same(pruned, talk(models["eager"]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_ROWS_LEAVE])
def test_decoding_after_passive_layers(family, models, inputs, name, tmp_path):
    """What the prompt's layers did is the same with a static cache, and without any."""
    model, method = models["sdpa"], pruning_method(name, models["sdpa"], tmp_path)
    if family.refuses_passive(model, 2):
        with pytest.raises(NotImplementedError, match="passive"):
            vtp.prune(model, method)
        return
    with vtp.prune(model, method):
        expected = model.generate(**inputs, **GREEDY, **DETAILS)
        if not any(windows(model)):
            static = model.generate(**inputs, **GREEDY, **DETAILS, cache_implementation="static")
            assert_same(static, expected)
        anew = model.generate(**inputs, **DETAILS, max_new_tokens=1, use_cache=False)
    torch.testing.assert_close(anew.logits[0], expected.logits[0], rtol=0, atol=2e-5)


# --- the untouched model ------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keep_all_is_bit_identical(models, inputs, attention):
    model = models[attention]
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.Schedule({2: 1.0, 3: 1.0, 4: 1.0})):
        kept_all = model.generate(**inputs, **GREEDY, **DETAILS)
    removed = model.generate(**inputs, **GREEDY, **DETAILS)
    for output in (kept_all, removed):
        assert_same(output, untouched, tolerance=0)


def test_no_image_passes_untouched(family, models):
    model = models["sdpa"]
    inputs = family.batch(model, ((), 5), ((), 9))
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        output = model.generate(**inputs, **GREEDY, **DETAILS)
        with pytest.raises(RuntimeError, match="nothing to report"):
            run.report()
    assert_same(output, untouched, tolerance=0)


def test_bfloat16(family, inputs):
    """Rounding differs with the shapes of the products, so not to the bit, but nearly so."""
    model = family.model("sdpa", torch.bfloat16)
    if any("experts" in name for name, _ in model.named_modules()):
        pytest.skip("rounding sends rows to other experts")
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.Schedule({2: 1.0, 3: 1.0})):
        assert_same(model.generate(**inputs, **GREEDY, **DETAILS), untouched, tolerance=0)
    with vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        pruned = model.generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    eager = family.model("eager", torch.bfloat16)
    with MaskedReference(eager, dict.fromkeys(kept), given=kept):
        reference = eager.generate(**inputs, **GREEDY, **DETAILS)
    torch.testing.assert_close(pruned.logits[0], reference.logits[0], rtol=0.02, atol=0.25)


# --- what a family cannot do ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_grid_positions_do_not_close_up(name):
    model = FAMILIES[name].model("sdpa")
    with pytest.raises(NotImplementedError, match=rf"{name} cannot run FastV with positions='cont"):
        vtp.apply(model, vtp.FastV(2), positions="contiguous")


#: Tried by tests/models/test_every_family.py, and refused where they are not named.
IN_EVERY_PAGE = {*SELECTORS, "cdpruner", "divprune", "framedifference", "vidcom2"}


def test_supported_models_can_run_what_they_say(tmp_path):
    """Each family that is named is tested with each method that is named, and no other is."""
    supported = vtp.supported_models()
    architectures = {type(family.make()).__name__ for family in ALL.values()}
    named = {name for family in supported.values() for name in family["architectures"]}
    assert named == architectures
    for name, family in ALL.items():
        model = family.model("sdpa")
        methods = {pruning_method(method, model, tmp_path / name).name for method in NAMES}
        parts = parts_of(model)
        found = supported[parts.family]
        assert methods <= set(found["methods"]) <= methods | IN_EVERY_PAGE
        assert found["vision_tower"] == (parts.page.tower(parts.base) is not None)
    assert supported["qwen3_vl"]["positions"] == ["original"] != supported["llava"]["positions"]
