"""VisiPruner does what a plain re-implementation of the published arithmetic does."""

from collections import Counter

import pytest
import torch
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava
from visipruner_reference import PlainVisiPruner

import vtp_kernels as vtp
from near_ties import until_clear
from vtp_kernels.methods import Method, method_from_spec

DEPTH, SHALLOW = 14, 3
FIRST = SHALLOW + 1  # the first layer that is judged
MODELS = 60


@pytest.fixture(scope="module")
def model():
    return tiny_llava(num_hidden_layers=DEPTH)


def between(a, b):
    return (a + b) / 2


def fusion_threshold(draw, fires, smallest):
    """One with which fusion happens early, late or never, given the smallest cosine by layer."""
    layers = sorted(smallest)
    if fires == "never":
        return min(smallest.values()) - 0.01
    if fires == "early":
        return smallest[layers[0]] + 1e-3
    # Any layer that goes below all before it may be the one.
    records = [x for x in layers[1:] if smallest[x] < min(smallest[y] for y in layers if y < x)]
    layer = records[draw.integer(0, len(records))] if records else layers[0]
    before = [smallest[x] for x in layers if x < layer]
    return between(smallest[layer], min(before, default=1.0))


def token_threshold(draw, keeps, norms):
    norms = sorted(norms)
    if keeps == "none":
        return norms[-1] + 0.1
    rank = draw.integer(0, len(norms) - 1)
    return between(norms[rank], norms[rank + 1])


def exit_threshold(draw, exits, smallest):
    """One that two layers pass, or none, given the smallest cosine of what stays by layer."""
    best = sorted(smallest, reverse=True)
    if not exits or len(best) < 3:
        return 1.1
    return between(best[1], best[2])


def assert_agrees(model, inputs, settings, **options):
    settings = {"shallow_layers": SHALLOW} | settings
    plain = PlainVisiPruner(**settings).run(model, inputs)
    method = vtp.VisiPruner(**settings, **options)
    with vtp.prune(model, method) as run:
        logits = model(**inputs).logits[0, -1]
    report = run.report()
    events = {event["event"]: event["layer"] for event in report.events}
    for event, layer in (("fusion", plain.fusion), ("exit", plain.exit)):
        # What the last layer shows has no consequence, and is not looked at.
        assert events.get(event) == (None if layer == DEPTH - 1 else layer)
    if plain.fusion is not None and plain.fusion < DEPTH - 2:
        kept = report.kept[plain.fusion + 1][0] & (inputs["input_ids"][0] == IMAGE)
        assert kept.nonzero()[:, 0].tolist() == plain.kept
    torch.testing.assert_close(logits, plain.logits, rtol=0, atol=1e-3)
    return plain


@torch.no_grad()
def test_equals_the_published_arithmetic_on_random_models(draw):
    """Same fusion layer, same tokens, same exit layer, same logits."""
    branches = Counter()

    def check(case):
        model = tiny_llava(num_hidden_layers=DEPTH, seed=draw.integer(0, 2**31))
        inputs = batch(prompt(1 + case % 3, draw.integer(1, 9), seed=case), seed=case)
        settings = {
            "consecutive_votes": draw.integer(0, 2) == 1,
            "shallow_attention": ("exact", "exact", "skip")[draw.integer(0, 3)],
            "shallow_first_layer": ("merge_first", "keep_second_half")[draw.integer(0, 2)],
            "shallow_visual_rows": ("causal", "none")[draw.integer(0, 2)],
        }

        def look():
            return PlainVisiPruner(shallow_layers=SHALLOW, **settings).run(model, inputs)

        fires, keeps = ("early", "late", "never")[case % 3], ("none", "some", "some")[case // 3 % 3]
        smallest = {layer: min(cosine) for layer, cosine in list(look().cosine.items())[:-3]}
        settings["fusion_threshold"] = fusion_threshold(draw, fires, smallest)
        found = look()
        fused = found.fusion
        if fused is not None:
            settings["token_threshold"] = token_threshold(draw, keeps, found.norm[fused])
            settings["min_keep"] = 0 if keeps == "none" else draw.integer(0, 12)
            later = [min(c) for layer, c in look().cosine.items() if layer > fused]
            settings["exit_threshold"] = exit_threshold(draw, draw.integer(0, 3) > 0, later)
        plain = assert_agrees(model, inputs, settings)
        branches[fires if plain.fusion is not None else "never"] += 1
        branches["keeps none" if plain.kept == [] else "keeps some"] += plain.kept is not None
        branches["exits" if plain.exit is not None else "stays"] += bool(plain.kept)

    for case in range(MODELS):
        until_clear(check, case)
    seen = {name for name, count in branches.items() if count >= 3}
    assert seen >= {"early", "late", "never", "keeps none", "keeps some", "exits", "stays"}


SETTINGS = {"fusion_threshold": 0.99, "token_threshold": 0.3, "exit_threshold": 0.98}


@torch.no_grad()
@pytest.mark.parametrize(
    "stages",
    [(), ("shallow",), ("middle",), ("deep",), ("shallow", "deep"), ("middle", "deep")],
    ids="+".join,
)
def test_stages_can_be_left_out(model, stages):
    settings = SETTINGS | {"stages": stages, "exit_threshold": 0.7}
    assert_agrees(model, one(), settings)


@torch.no_grad()
def test_without_shallow_layers_contributions_count_from_layer_0(model):
    plain = PlainVisiPruner(shallow_layers=0).run(model, one())
    threshold = between(*sorted(plain.norm[0])[4:6])
    settings = {"shallow_layers": 0, "fusion_threshold": 1.0, "token_threshold": threshold}
    assert assert_agrees(model, one(), settings).fusion == 0


@torch.no_grad()
@pytest.mark.parametrize("least", [1, 5])
def test_fusion_leaves_at_least_so_many(model, least):
    settings = {"stages": ("middle",), "fusion_threshold": 1.0, "token_threshold": 1e9}
    assert len(assert_agrees(model, one(), settings | {"min_keep": least}).kept) == least


@torch.no_grad()
def test_a_floor_above_what_there_is_keeps_everything(model):
    settings = {"stages": ("middle",), "fusion_threshold": 1.0, "token_threshold": 1e9}
    method = vtp.VisiPruner(shallow_layers=SHALLOW, min_keep=1000, **settings)
    dense = model(**one()).logits
    with vtp.prune(model, method) as run:
        assert torch.equal(model(**one()).logits, dense)
    assert [event["event"] for event in run.report().events] == ["fusion"]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decision", ["exact", "pipelined"])
def test_every_prompt_of_a_batch_decides_for_itself(attention, decision):
    """Prompts of different lengths, with no image to three: as each of them alone."""
    model = tiny_llava(attention, num_hidden_layers=DEPTH)
    method = vtp.VisiPruner(shallow_layers=SHALLOW, **SETTINGS, decision=decision)
    inputs = three()
    with vtp.prune(model, method) as run:
        together = model(**inputs).logits[:, -1]
        report = run.report()
        picture = 0
        for b, mask in enumerate(inputs["attention_mask"].bool()):
            ids = inputs["input_ids"][b][mask][None]
            images = int((ids == IMAGE).sum()) // 16
            alone = {"input_ids": ids}
            if images:
                alone["pixel_values"] = inputs["pixel_values"][picture : picture + images]
            picture += images
            torch.testing.assert_close(model(**alone).logits[0, -1], together[b], rtol=0, atol=2e-5)
            if images:
                single = [layer[0] for layer in run.report().visual_tokens_per_layer]
                assert [layer[b] for layer in report.visual_tokens_per_layer] == single
    assert len({tuple(layer[b] for layer in report.visual_tokens_per_layer) for b in range(3)}) == 3


@torch.no_grad()
def test_pipelined_decides_one_layer_later(model):
    inputs = one()
    layers = []
    for decision in ("exact", "pipelined"):
        method = vtp.VisiPruner(
            ("shallow", "middle"), shallow_layers=SHALLOW, **SETTINGS, decision=decision
        )
        with vtp.prune(model, method) as run:
            model(**inputs)
        report = run.report()
        (pruned,) = (event["layer"] for event in report.events if event["event"] == "pruned")
        layers.append((pruned, report.kept[pruned]))
    (first, kept), (second, kept_later) = layers
    assert second == first + 1 and torch.equal(kept, kept_later)


# --- decoding -----------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 8, "do_sample": False}


class MaskedVisiPruner:
    """Nothing leaves: per layer, whole columns of the eager model's masks are closed. What is
    passive, who stays and what is forgotten is taken over from the pruned run's report."""

    def __init__(self, model, method, report, visual):
        self.model, self.method, self.report, self.visual = model, method, report, visual
        self.hooks = []

    def __enter__(self):
        for index, layer in enumerate(self.model.model.language_model.layers):
            before = self.before(index)
            self.hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def before(self, index):
        stages = [layer for layer in self.report.kept if layer <= index]
        forgets = index in self.method.forgetful_layers(DEPTH)

        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            decoding = mask.shape[2] == 1
            closed = torch.zeros_like(self.visual)
            if stages:
                closed = ~self.report.kept[max(stages)] & self.visual
            if forgets and decoding:
                closed = closed | self.visual
            columns = mask[..., : closed.shape[1]]
            columns.masked_fill_(closed[:, None, None], torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        return hook


@torch.no_grad()
@pytest.mark.parametrize("inputs", [one, three])
@pytest.mark.parametrize("stages", [("middle", "deep"), ("middle",)], ids="+".join)
@pytest.mark.parametrize("drop", [False, True])
def test_generates_as_the_masked_reference(model, inputs, stages, drop):
    inputs = inputs()
    method = vtp.VisiPruner(stages, shallow_layers=SHALLOW, **SETTINGS, drop_shallow_kv=drop)
    with vtp.prune(model, method) as run:
        pruned = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    report = run.report()
    eager = tiny_llava("eager", num_hidden_layers=DEPTH)
    with MaskedVisiPruner(eager, method, report, inputs["input_ids"] == IMAGE):
        expected = eager.generate(**inputs, **GREEDY)
    assert torch.equal(pruned.sequences, expected)
    held = [layer.keys.shape[2] for layer in pruned.past_key_values.layers]
    generated = GREEDY["max_new_tokens"] - 1
    assert held == [max(layer) + generated for layer in report.kv_tokens_per_layer]


@torch.no_grad()
def test_shallow_layers_are_passive_in_the_prompt_alone(model):
    """Decoding attends to the visual keys of shallow layers, as in the published code: the same
    steps by hand, on the cache of a plain run of the prompt."""
    inputs = one()
    method = vtp.VisiPruner(("shallow",), shallow_layers=SHALLOW)
    with vtp.prune(model, method):
        output = model(**inputs, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        step = model(input_ids=token, past_key_values=output.past_key_values).logits
    output = None
    with vtp.prune(model, method):
        output = model(**inputs, use_cache=True)
    unpruned_step = model(input_ids=token, past_key_values=output.past_key_values).logits
    torch.testing.assert_close(step, unpruned_step, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [one, three])
def test_generated_text_sees_text_and_one_sink(attention, inputs):
    """Where shallow layers skip, a generated token is text like any other: generating with a cache
    is the same as reading the whole text anew for every token."""
    model = tiny_llava(attention, num_hidden_layers=DEPTH)
    method = vtp.VisiPruner(("shallow",), shallow_layers=SHALLOW, shallow_attention="skip")
    details = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
    with vtp.prune(model, method) as run:
        cached = model.generate(**inputs(), **GREEDY, **details)
        report = run.report()
        anew = model.generate(**inputs(), **GREEDY, **details, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    for a, b in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    mask, ids = inputs()["attention_mask"], inputs()["input_ids"]
    text, visual = (mask.bool() & (ids != IMAGE)).sum(1), (ids == IMAGE).sum(1)
    assert report.kv_tokens_per_layer[0] == (text + visual.clamp(max=1)).tolist()
    assert report.kv_tokens_per_layer[SHALLOW] == (text + visual).tolist()
    held = [layer.keys.shape[2] for layer in cached.past_key_values.layers]
    assert held == [max(layer) + 7 for layer in report.kv_tokens_per_layer]


@torch.no_grad()
@pytest.mark.parametrize("shallow_attention", ["exact", "skip"])
def test_a_further_turn_with_an_image(model, shallow_attention):
    """Passive attention over a cache: its keys count as text, and nothing breaks."""
    method = vtp.VisiPruner(
        shallow_layers=SHALLOW,
        **SETTINGS,
        drop_shallow_kv=True,
        shallow_attention=shallow_attention,
    )
    with vtp.prune(model, method) as run:
        first = model(**one(), use_cache=True)
        length = first.past_key_values.get_seq_length()
        further = batch(prompt(1, 5, seed=8), seed=9)
        rows = further["input_ids"].shape[1]
        further["attention_mask"] = torch.ones(1, length + rows, dtype=torch.long)
        second = model(**further, past_key_values=first.past_key_values)
    assert torch.isfinite(second.logits).all()
    assert run.report().kv_tokens_per_layer[0] == [2 * one()["input_ids"].shape[1] - 2 * 16 - 2]


@torch.no_grad()
@pytest.mark.parametrize("shallow_attention", ["exact", "skip"])
@pytest.mark.parametrize(
    "way",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["static cache", "prompt lookup"],
)
def test_ways_to_generate(model, shallow_attention, way):
    method = vtp.VisiPruner(shallow_layers=SHALLOW, shallow_attention=shallow_attention, **SETTINGS)
    with vtp.prune(model, method):
        expected = model.generate(**one(), **GREEDY, suppress_tokens=[IMAGE])
        got = model.generate(**one(), **GREEDY, suppress_tokens=[IMAGE], **way)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_beams_see_their_own_prompt(model):
    """Beams of a batch are those of its prompts alone."""
    method = vtp.VisiPruner(shallow_layers=SHALLOW, shallow_attention="skip", **SETTINGS)
    settings = GREEDY | {"num_beams": 3, "suppress_tokens": [IMAGE]}
    with vtp.prune(model, method):
        inputs = batch(prompt(1, 9, 0), prompt(1, 4, 1))
        together = model.generate(**inputs, **settings)[:, -8:]
        for b, ids in enumerate((prompt(1, 9, 0), prompt(1, 4, 1))):
            alone = {"input_ids": ids[None], "pixel_values": inputs["pixel_values"][b : b + 1]}
            assert torch.equal(model.generate(**alone, **settings)[0, -8:], together[b])


def test_a_static_cache_forgets_nothing(model):
    method = vtp.VisiPruner(shallow_layers=SHALLOW, drop_shallow_kv=True)
    with vtp.prune(model, method), pytest.raises(NotImplementedError, match="StaticCache"):
        model.generate(**one(), **GREEDY, cache_implementation="static")


# --- the model is left as it was -----------------------------------------------------------------


@torch.no_grad()
def test_attention_modules_stay_where_they_are(model):
    inputs = one()
    before = model(**inputs).logits
    names = list(model.state_dict())
    modules = [layer.self_attn for layer in model.model.language_model.layers]
    handle = vtp.apply(model, vtp.VisiPruner(shallow_layers=SHALLOW))
    assert list(model.state_dict()) == names
    assert [layer.self_attn for layer in model.model.language_model.layers] == modules
    touched = ["forward" in vars(attention) for attention in modules]
    assert touched == [True] * SHALLOW + [False] + [True] * (DEPTH - 1 - FIRST) + [False]
    model.to(torch.float64).to(torch.float32)
    handle.remove()
    handle.remove()
    assert not any("forward" in vars(attention) for attention in modules)
    assert torch.equal(model(**inputs).logits, before)


# --- calibration --------------------------------------------------------------------------------


@torch.no_grad()
def test_calibrate_gives_the_schedule_of_half_the_prompts(model):
    method = vtp.VisiPruner(shallow_layers=SHALLOW, **SETTINGS)
    samples = [batch(prompt(1, 5 + i, seed=i), seed=i) for i in range(5)]
    samples.append(batch(prompt(0, 5, seed=0)))
    schedule = vtp.calibrate(model, samples, method)
    assert schedule.score == "contribution"
    assert all(layer > FIRST for layer in schedule.keep)
    shares = []
    for sample in samples[:-1]:
        with vtp.prune(model, method) as run:
            model(**sample)
        shares.append([layer[0] / 16 for layer in run.report().visual_tokens_per_layer])
    for layer in range(DEPTH):
        wanted = sorted(prompt[layer] for prompt in shares)[2]
        stage = max((x for x in schedule.keep if x <= layer), default=None)
        assert wanted == (1.0 if stage is None else schedule.keep[stage])
    fixed = vtp.VisiPruner(shallow_layers=SHALLOW, decision="fixed", schedule=schedule)
    with vtp.prune(model, fixed) as run:
        model(**samples[0])
    counts = [layer[0] for layer in run.report().visual_tokens_per_layer]
    assert [counts[layer] for layer in schedule.keep] == [
        int(share * 16 + 0.5) for share in schedule.keep.values()
    ]


def test_calibrate_needs_pictures(model):
    with pytest.raises(ValueError, match="batches: no prompt has an image"):
        vtp.calibrate(model, [batch(prompt(0, 5, seed=0))], vtp.VisiPruner(shallow_layers=3))


REFUSED = {
    "text leaves": (
        vtp.InflectionPruning(None, llm_layers=(2,)),
        "contribution",
        "method: InflectionPruning lets text leave before layer 2",
    ),
    "before layer 0": (
        vtp.InflectionPruning("similarity", llm_layers=()),
        "contribution",
        "method: InflectionPruning decides before layer 0.*'contribution' cannot",
    ),
    "chance before layer 0": (
        vtp.RandomPruning(0, 0.5),
        "last_token",
        "method: RandomPruning decides before layer 0.*'last_token' cannot",
    ),
    "score": (vtp.FastV(2, 0.5), "best", "Schedule.score: got 'best'"),
    "layer": (vtp.FastV(40, 0.5), "last_token", "FastV.layer: there is no layer 40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calibrate_refuses_what_no_schedule_can_do(model, case):
    """Before a prompt runs, but for what only a prompt can tell."""
    method, score, message = REFUSED[case]
    before = [len(layer._forward_pre_hooks) for layer in model.model.language_model.layers]
    samples = [one()] if case == "text leaves" else iter(lambda: pytest.fail("a prompt ran"), None)
    with pytest.raises(ValueError, match=message):
        vtp.calibrate(model, samples, method, score=score)
    hooks = [len(layer._forward_pre_hooks) for layer in model.model.language_model.layers]
    assert hooks == before


@pytest.mark.parametrize(
    "method, score",
    [
        (vtp.InflectionPruning("similarity", llm_layers=(), min_keep=2), "random"),
        (vtp.InflectionPruning(None, llm_layers=(3,), text_keep=1.0), "text"),
        (vtp.RandomPruning(0, 0.5), "random"),
        (vtp.PyramidDrop((2, 5), (0.5, 0.25)), "last_token"),
    ],
)
def test_calibrate_serves_methods_that_prune_pictures_alone(model, method, score):
    """On one prompt the schedule keeps as many tokens in every layer as the method."""
    schedule = vtp.calibrate(model, [one()], method, score=score)
    counts = []
    for at_work in (method, schedule):
        with vtp.prune(model, at_work) as run, torch.no_grad():
            model(**one())
        counts.append(run.report().visual_tokens_per_layer)
    assert counts[0] == counts[1] and counts[0][-1] < [16]


# --- settings -----------------------------------------------------------------------------------


def test_settings_travel_through_files(tmp_path):
    for method in (
        vtp.VisiPruner(),
        vtp.VisiPruner(("deep", "shallow"), shallow_layers=2, consecutive_votes=True),
        vtp.VisiPruner(decision="fixed", schedule=vtp.Schedule({3: 0.5}, score="contribution")),
    ):
        method.save(tmp_path / "method.json")
        assert Method.load(tmp_path / "method.json") == method
    assert vtp.VisiPruner(("deep", "shallow")).stages == ("shallow", "deep")


def test_settings_on_the_command_line():
    method = method_from_spec(
        "visipruner:fusion_threshold=0.9,stages=middle+deep,drop_shallow_kv=true"
    )
    stages = ("middle", "deep")
    assert method == vtp.VisiPruner(stages, fusion_threshold=0.9, drop_shallow_kv=True)
    assert method_from_spec("visipruner") == vtp.VisiPruner()
    for wrong in ("visipruner:votes=3", "visipruner:exit_votes", "visipruner:drop_shallow_kv=1"):
        with pytest.raises(ValueError, match=r"expected (FIELD=VALUE|true or false)"):
            method_from_spec(wrong)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stages": ("middle", "shady")}, "VisiPruner.stages: expected some of"),
        ({"stages": ("deep", "deep")}, "VisiPruner.stages: expected some of"),
        ({"shallow_layers": -1}, "VisiPruner.shallow_layers: layers are counted from 0"),
        ({"exit_votes": 0}, "VisiPruner.exit_votes: expected at least 1"),
        ({"min_keep": -1}, "VisiPruner.min_keep: expected at least 0"),
        ({"token_threshold": float("nan")}, "VisiPruner.token_threshold: expected a finite"),
        ({"shallow_attention": "none"}, "VisiPruner.shallow_attention: got 'none'"),
        ({"decision": "fixed"}, 'VisiPruner.schedule: decision="fixed" needs a Schedule'),
        ({"schedule": {"method": "schedule", "keep": {3: 1}}}, "no other decision takes one"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        vtp.VisiPruner(**settings)


def test_a_model_with_too_few_layers_is_refused(model):
    with pytest.raises(ValueError, match=r"VisiPruner\.shallow_layers: there is no layer 19"):
        vtp.apply(model, vtp.VisiPruner(shallow_layers=20))


def test_skipping_beside_a_longer_prompt_without_pictures():
    """Such a prompt is as wide as the batch, whose other rows wait outside of the attention."""
    model = tiny_llava()
    schedule = vtp.Schedule({3: 5})
    method = vtp.VisiPruner(
        shallow_layers=2, shallow_attention="skip", decision="fixed", schedule=schedule
    )
    shown, text = prompt(1, 4, 0), prompt(0, 60, 3)
    with torch.no_grad(), vtp.prune(model, method):
        beside = model(**batch(shown, text)).logits[0, -1]
        alone = model(**batch(shown)).logits[0, -1]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)
