"""InflectionPruning does what a plain telling of its description does, in every way to generate."""

import copy
import json
import threading

import pytest
import torch
from inflection_reference import PlainInflection
from masked_reference import MaskedReference
from tiny_llava import BATCHES, ENCODES_FIRST, IMAGE, batch, one, prompt, three, tiny_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig, StaticCache

import vtp_kernels as vtp
from near_ties import until_clear
from vtp_kernels.methods import Method, method_from_spec

GREEDY = {"max_new_tokens": 6, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
SETTINGS = {
    "first": {"llm_layers": ()},
    "attention": {"source": "attention", "min_keep": 3, "llm_layers": ()},
    "both": {"llm_layers": (2, 4), "min_keep": 4},
    "knees": {"llm_layers": (1, 3), "rule": "mass", "visual_keep": "knee", "text_keep": "knee"},
    "outliers": {"rule": "iqr", "llm_layers": (3,)},
    "second": {"source": None, "llm_layers": (3,), "visual_keep": 5, "text_keep": 0.5},
    "padded": {"source": "attention", "max_keep": 6, "min_keep": 2, "llm_layers": (2, 3)},
    "padded knees": {"max_keep": 7, "llm_layers": (2,), "visual_keep": "knee", "text_keep": 1},
    "rope": {"llm_layers": (2,), "score_without_rope": False, "protect_template": False},
    "tail": {"llm_layers": (1, 2), "template_tail": 3, "text_keep": 0.0, "visual_keep": 1.0},
}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_llava(kind) for kind in ("sdpa", "eager")}


def pruning(name):
    return vtp.InflectionPruning(**SETTINGS[name])


def single(inputs, row):
    """One prompt of a batch, with its pictures, without padding."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
    pictures = (inputs["input_ids"] == IMAGE).sum(1) // 16
    start, count = int(pictures[:row].sum()), int(pictures[row])
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if count:
        alone["pixel_values"] = inputs["pixel_values"][start : start + count]
    return alone


def columns(report, row, length):
    return {
        layer: mask[row, -length:].nonzero()[:, 0].tolist() for layer, mask in report.kept.items()
    }


def assert_same(pruned, reference, tolerance=2e-5):
    assert torch.equal(pruned.sequences, reference.sequences)
    for a, b in zip(pruned.logits, reference.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- what it chooses ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_chooses_as_the_plain_telling_on_random_models(draw, name):
    """Same rows before every layer, same logits; prompts with one to three pictures, in a batch."""
    method = pruning(name)

    def check():
        model = tiny_llava(seed=draw.integer(0, 2**31))
        seeds = [draw.integer(0, 2**31) for _ in range(4)]
        inputs = batch(
            *(
                prompt(n, draw.integer(1, 9), seed)
                for n, seed in zip((2, 1, 0, 3), seeds, strict=True)
            ),
            seed=seeds[0],
        )
        with vtp.prune(model, method) as run:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            report = run.report()
        stages = ([0] if method.source else []) + list(method.llm_layers)
        for row in (0, 1, 3):
            alone = single(inputs, row)
            plain = PlainInflection(**SETTINGS[name]).run(model, alone)
            length = alone["input_ids"].shape[1]
            got = columns(report, row, length)
            before = list(range(length))
            for layer in stages:  # a decision by which nothing leaves is none
                before = got.get(layer, before)
                assert before == plain.kept[layer], f"layer {layer}"
            torch.testing.assert_close(logits[row], plain.logits, rtol=0, atol=1e-4)

    for _ in range(3):
        until_clear(check)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_prompt_of_a_batch_decides_for_itself(models, name, attention):
    model, inputs = models[attention], three()
    with vtp.prune(model, pruning(name)) as run:
        together = model(**inputs, logits_to_keep=1).logits[:, -1]
        report = run.report()
        for row in range(4):
            alone = single(inputs, row)
            logits = model(**alone, logits_to_keep=1).logits[0, -1]
            torch.testing.assert_close(logits, together[row], rtol=0, atol=2e-5)
            if "pixel_values" not in alone:  # text stays where no picture is
                assert all(counts[row] == 9 for counts in report.tokens_per_layer)
                continue
            single_report = run.report()
            for field in ("tokens_per_layer", "visual_tokens_per_layer", "kv_tokens_per_layer"):
                assert [layer[row] for layer in getattr(report, field)] == [
                    layer[0] for layer in getattr(single_report, field)
                ]
            length = alone["input_ids"].shape[1]
            for layer, kept in columns(single_report, 0, length).items():
                assert columns(report, row, length)[layer] == kept


@torch.no_grad()
def test_max_keep_changes_nothing_but_what_is_read(models, monkeypatch):
    """The same rows whether the host knows their numbers or not; padded, nothing is asked."""
    model, inputs = models["sdpa"], three()
    settings = {"llm_layers": (2, 4), "min_keep": 3}
    reads = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        reads.append(tensor.shape)
        return tolist(tensor)

    def run_with(**more):
        reads.clear()
        with vtp.prune(model, vtp.InflectionPruning(**settings, **more)) as run:
            monkeypatch.setattr(torch.Tensor, "tolist", counted)
            logits = model(**inputs, logits_to_keep=1).logits
            monkeypatch.undo()
            return logits, run.report(), len(reads)

    exact, report, asked = run_with()
    padded, padded_report, never = run_with(max_keep=16)
    torch.testing.assert_close(padded, exact, rtol=0, atol=2e-5)
    for layer, mask in report.kept.items():
        assert torch.equal(mask, padded_report.kept[layer])
    assert report.tokens_per_layer == padded_report.tokens_per_layer
    assert asked - never == 1  # how many rows stage 1 left; shares of them follow


@torch.no_grad()
def test_curves_of_pictures_are_each_their_own(models, draw):
    """What is kept of a picture depends on no other picture, nor on its place."""
    model = models["sdpa"]

    def clear_pictures():
        pictures = draw.normal(3, 3, 56, 56)
        inputs = batch(prompt(3, 4, 0)) | {"pixel_values": pictures}
        PlainInflection(**SETTINGS["first"]).run(model, inputs)  # whose knees have to be clear
        return pictures, inputs

    pictures, inputs = until_clear(clear_pictures)
    with vtp.prune(model, pruning("first")) as run:
        model(**inputs)
        [event] = [e for e in run.report().events if e["event"] == "inflection"]
        for order in ([2, 0, 1], [1, 1, 2]):
            model(**inputs | {"pixel_values": pictures[order]})
            [other] = [e for e in run.report().events if e["event"] == "inflection"]
            assert other["kept"] == [event["kept"][i] for i in order]
    assert event["layer"] == 0 and event["tokens"] == [16] * 3
    visual = run.report().visual_tokens_per_layer[0][0]
    assert sum(other["kept"]) == visual


@torch.no_grad()
def test_what_never_leaves(models):
    """The first text token, the last, the template in front, and the tail; all else may."""
    inputs = batch(prompt(2, 6, 4))
    ids = inputs["input_ids"][0]
    for protect, tail in ((True, 1), (True, 4), (False, 1), (False, 2)):
        method = vtp.InflectionPruning(
            source=None,
            llm_layers=(1, 2),
            visual_keep=0,
            text_keep=0,
            protect_template=protect,
            template_tail=tail,
        )
        with vtp.prune(models["sdpa"], method) as run:
            models["sdpa"](**inputs)
        kept = run.report().kept[1][0].nonzero()[:, 0].tolist()
        front = list(range(int((ids == IMAGE).nonzero()[0]))) if protect else [0]
        assert kept == front + list(range(len(ids) - tail, len(ids)))


# --- in every way to generate -------------------------------------------------------------------


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", SETTINGS)
def test_generates_as_the_masked_reference(models, name, positions, attention, inputs):
    inputs = BATCHES[inputs]()
    with vtp.prune(models[attention], pruning(name), positions=positions) as run:
        pruned = models[attention].generate(**inputs, **GREEDY, **DETAILS)
        report = run.report()
    assert any(not mask.equal(inputs["attention_mask"].bool()) for mask in report.kept.values())
    stages = dict.fromkeys(report.kept)
    contiguous = positions == "contiguous"
    with MaskedReference(models["eager"], stages, given=report.kept, contiguous=contiguous):
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    assert_same(pruned, reference)


@pytest.mark.parametrize("name", ["both", "padded"])
@pytest.mark.parametrize("inputs", BATCHES)
def test_beams_see_their_own_pictures(models, name, inputs):
    """Every beam of a prompt keeps what its prompt keeps alone."""
    model, inputs = models["sdpa"], BATCHES[inputs]()
    if not ENCODES_FIRST and len(inputs["input_ids"]) > 1:
        inputs = batch(prompt(1, 9, 0), prompt(1, 3, 1))
    with vtp.prune(model, pruning(name)) as run:
        model.generate(**inputs, **GREEDY)
        kept = run.report().kept
        beams = model.generate(**inputs, **GREEDY, **DETAILS, num_beams=3, num_return_sequences=2)
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer].repeat_interleave(3, dim=0))
        expanded = run.report().kept
    with MaskedReference(models["eager"], dict.fromkeys(expanded), given=expanded):
        reference = models["eager"].generate(
            **inputs, **GREEDY, **DETAILS, num_beams=3, num_return_sequences=2
        )
    assert torch.equal(beams.sequences, reference.sequences)


@pytest.mark.parametrize("name", ["both", "padded"])
def test_sampling(models, name):
    settings = GREEDY | DETAILS | {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(11)
    with vtp.prune(models["sdpa"], pruning(name)) as run:
        pruned = models["sdpa"].generate(**three(), **settings)
    kept = run.report().kept
    torch.manual_seed(11)
    with MaskedReference(models["eager"], dict.fromkeys(kept), given=kept):
        reference = models["eager"].generate(**three(), **settings)
    assert_same(pruned, reference)


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("name", ["both", "padded", "second"])
def test_static_cache(models, name, inputs):
    inputs = BATCHES[inputs]()
    for attention in ("sdpa", "eager"):
        with vtp.prune(models[attention], pruning(name)):
            dynamic = models[attention].generate(**inputs, **GREEDY, **DETAILS)
            static = models[attention].generate(
                **inputs, **GREEDY, **DETAILS, cache_implementation="static"
            )
        assert isinstance(static.past_key_values, StaticCache)
        assert_same(static, dynamic)


@pytest.mark.parametrize("name", ["both", "padded", "second"])
def test_assisted_decoding_equals_greedy(models, name):
    model, inputs = models["sdpa"], one()
    drafts = tiny_llava(num_hidden_layers=2, seed=5)
    with vtp.prune(model, pruning(name)) as run:
        greedy = model.generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        for settings in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": drafts}):
            assisted = model.generate(**inputs, **GREEDY, **DETAILS, **settings)
            for layer, mask in run.report().kept.items():
                assert torch.equal(mask[:, : kept[layer].shape[1]], kept[layer])
            assert_same(assisted, greedy)


@pytest.mark.parametrize("name", ["both", "padded"])
def test_without_a_cache_each_step_is_a_prompt_of_its_own(models, name):
    model, inputs = models["sdpa"], three()
    with vtp.prune(model, pruning(name)), torch.no_grad():
        output = model.generate(**inputs, **GREEDY, **DETAILS, use_cache=False)
        start = inputs["input_ids"].shape[1]
        for step, logits in enumerate(output.logits):
            ids = output.sequences[:, : start + step]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
            again = model(**inputs | {"input_ids": ids, "attention_mask": mask}).logits[:, -1]
            torch.testing.assert_close(logits, again, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["both", "padded", "rope"])
def test_a_further_turn(models, name):
    """Of text, and one with a picture, whose rows alone are chosen among."""
    model, inputs = models["sdpa"], batch(prompt(1, 5, 0), prompt(1, 5, 1))
    turns = [
        torch.stack([prompt(0, 4, seed) for seed in (4, 5)]),
        prompt(1, 4, 6)[None].repeat(2, 1),
    ]
    picture = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    for turn, more in zip(turns, ({}, {"pixel_values": picture}), strict=True):
        with vtp.prune(model, pruning(name)) as run:
            first = model.generate(**inputs, **GREEDY, **DETAILS)
            kept = [run.report().kept]
            ids = torch.cat((first.sequences, turn), dim=1)
            second = model.generate(
                input_ids=ids, past_key_values=first.past_key_values, **more, **GREEDY, **DETAILS
            )
            kept.append(run.report().kept)
        stages = dict.fromkeys(kept[0])
        with MaskedReference(models["eager"], stages, given=kept[0]) as masked:
            expected = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
            masked.given = kept[1]
            expected = models["eager"].generate(
                input_ids=ids, past_key_values=expected.past_key_values, **more, **GREEDY, **DETAILS
            )
        assert_same(second, expected)


def test_inputs_embeds(models):
    model, inputs = models["sdpa"], three()
    with vtp.prune(model, pruning("both")) as run:
        expected = model.generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        output = model.generate(**inputs, **GREEDY, **DETAILS)
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer])
    for a, b in zip(output.logits, expected.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["both", "attention"])
def test_two_threads_on_one_model(models, name):
    """Plain calls, whose tower runs inside of them, and generate(), before which it ran."""
    model = models["sdpa"]
    prompts = [one(), three(), batch(prompt(2, 4, 6), seed=9), batch(prompt(1, 4, 6), seed=8)]

    def answer(inputs):
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=1).logits
        return logits, model.generate(**inputs, **GREEDY)

    with vtp.prune(model, pruning(name)):
        expected = [answer(inputs) for inputs in prompts]
        got = [[] for _ in prompts]

        def work(i):
            for _ in range(3):
                got[i].append(answer(prompts[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for wanted, answers in zip(expected, got, strict=True):
        assert len(answers) == 3
        for logits, ids in answers:
            assert torch.equal(logits, wanted[0]) and torch.equal(ids, wanted[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = tiny_llava(dtype=dtype), three()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for name in ("both", "attention", "padded"):
        with vtp.prune(model, pruning(name)) as run:
            model.generate(**inputs, **GREEDY)
        assert run.report().visual_tokens_per_layer[5][0] < 16


# --- report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both", "padded", "second"])
def test_report_counts_text_that_left(models, name):
    model, inputs = models["sdpa"], three()
    with vtp.prune(model, pruning(name)) as run, torch.no_grad():
        cache = model(**inputs).past_key_values
    report = run.report()
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    stage = real
    for layer in range(6):
        stage = report.kept.get(layer, stage)
        assert report.tokens_per_layer[layer] == stage.sum(1).tolist()
        assert report.visual_tokens_per_layer[layer] == (stage & visual).sum(1).tolist()
        held = cache.vtp.layers[layer]
        keys = cache.layers[layer].keys.shape[2]
        valid = held.valid_keys(keys, None) if held is not None else None
        held_now = real.sum(1) if held is None else torch.full((4,), keys)
        held_now = held_now if valid is None else valid.sum(1)
        assert report.kv_tokens_per_layer[layer] == held_now.tolist()
    text = (report.kept[max(report.kept)] & ~visual).sum(1).tolist()
    assert text[3] == 9 and text[0] < 15
    prompts = [list(layers) for layers in zip(*report.tokens_per_layer, strict=True)]
    deciding = 0
    for layer in report.kept.keys() - {0}:  # 64 wide, 4 heads of 16, 2 of keys; drafts: none
        for n in report.tokens_per_layer[layer - 1]:
            deciding += 2 * ((2 * n + 1) * 64 * (64 + n) + n * 64 * 32)
    assert report.prefill_flops == sum(vtp.flops(model, n) for n in prompts) + deciding
    last = [event for event in report.events if event["event"] == "pruned"][-1]
    assert last["text_after"] == text
    assert "15 text: " in str(report) and f"{text[0]} from layer {last['layer']}" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["events"] == report.events

    # pairs with a visual token, counted one by one
    def pairs(stay):
        total = 0
        for row, is_visual in zip(stay, visual, strict=True):
            here = is_visual[row].tolist()
            total += sum(here[q] or here[k] for q in range(len(here)) for k in range(q + 1))
        return total

    spent, stage = 0, real
    for layer in range(6):
        stage = report.kept.get(layer, stage)
        spent += pairs(stage)
    assert report.visual_attention_reduction == pytest.approx(1 - spent / (6 * pairs(real)))


def test_nothing_stays_behind(models):
    model = tiny_llava("sdpa")
    model.generate(**one(), **GREEDY)
    dense = model.generate(**three(), **GREEDY, **DETAILS)

    def traces():
        return [
            (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ]

    before = traces()
    for name in ("both", "attention"):
        handle = vtp.apply(model, pruning(name))
        assert traces() != before
        model.generate(**three(), **GREEDY)
        handle.remove()
        assert traces() == before
    again = model.generate(**three(), **GREEDY, **DETAILS)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, again.logits, strict=True))


def test_an_exception_in_the_tower_leaves_nothing_behind(models, monkeypatch):
    model, inputs = models["sdpa"], three()
    with vtp.prune(model, pruning("attention")) as run:
        expected = model.generate(**inputs, **GREEDY)
        report = str(run.report())
        for where in ("multi_modal_projector", "vision_tower"):
            module = getattr(model.model, where)

            def fail(*args, **kwargs):
                raise KeyboardInterrupt("stop")

            monkeypatch.setattr(module, "forward", fail)
            for call in (model, model.generate):
                with pytest.raises(KeyboardInterrupt):
                    call(**inputs)
            monkeypatch.undo()
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
            assert str(run.report()) == report


# --- towers -------------------------------------------------------------------------------------


def siglip_llava():
    """A tower without CLS, whose tokens all become visual tokens."""
    llama = tiny_llava().config
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        text_config=llama.text_config,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    return model


@torch.no_grad()
@pytest.mark.parametrize("source", ["similarity", "attention"])
def test_without_cls_all_tokens_stand_in_for_it(source):
    model, inputs = siglip_llava(), batch(prompt(2, 5, 0))
    with vtp.prune(model, vtp.InflectionPruning(source, llm_layers=())) as run:
        model(**inputs)
    tower = model.model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    if source == "similarity":
        mean = states[2].mean(1, keepdim=True)
        curve = torch.cosine_similarity(states[2], mean, dim=-1)
    else:
        layer = getattr(tower, "vision_model", tower).encoder.layers[1]
        x = layer.layer_norm1(states[1])
        query, key = (
            p(x).view(2, 16, 4, 8).transpose(1, 2)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        curve = (query @ key.transpose(2, 3) * 8**-0.5).softmax(-1).mean((1, 2))
    wanted = vtp.inflection(curve, backend="reference")
    visual = inputs["input_ids"][0] == IMAGE
    kept = run.report().kept[0][0][visual].view(2, 16)
    for picture in range(2):
        stays = wanted.indices[picture][: wanted.counts[picture]]
        assert kept[picture].nonzero()[:, 0].tolist() == stays.tolist()


@torch.no_grad()
def test_cls_as_a_visual_token_has_no_score_and_stays(models):
    """vision_feature_select_strategy="full" hands CLS to the language model as well."""
    model = tiny_llava("sdpa")
    model.config.vision_feature_select_strategy = "full"
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[1, 5] + [IMAGE] * 17 + [7, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}
    with vtp.prune(model, pruning("first")) as run:
        model(**inputs)
        full = run.report().kept[0][0][2:19]
    with vtp.prune(models["sdpa"], pruning("first")) as run:
        models["sdpa"](**inputs | {"input_ids": torch.cat((ids[:, :2], ids[:, 3:]), dim=1)})
        default = run.report().kept[0][0][2:18]
    assert full[0] and torch.equal(full[1:], default)


@torch.no_grad()
def test_another_feature_layer_in_a_call(models):
    model, inputs = models["sdpa"], one()
    with vtp.prune(model, pruning("attention")) as run:
        model(**inputs)
        usual = run.report().kept[0]
        model(**inputs, vision_feature_layer=-3)
        earlier = run.report().kept[0]
        with pytest.raises(ValueError, match="vision_feature_layer: the features are taken before"):
            model(**inputs, vision_feature_layer=0)
    plain = PlainInflection(**SETTINGS["attention"])
    model.config.vision_feature_layer = -3
    try:
        assert plain.run(model, inputs).kept[0] == earlier[0].nonzero()[:, 0].tolist()
    finally:
        model.config.vision_feature_layer = -2
    assert not torch.equal(usual, earlier)


@torch.no_grad()
def test_pictures_encoded_before_cannot_be_judged(models):
    model, inputs = models["sdpa"], one()
    if not ENCODES_FIRST:
        pytest.skip("this transformers encodes pictures within the call alone")
    encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with vtp.prune(model, pruning("first")):
        with pytest.raises(
            ValueError, match="InflectionPruning needs to know what the vision tower"
        ):
            model(**inputs, mm_encoder_outputs={"image": encoded})


# --- settings -----------------------------------------------------------------------------------


def test_settings_travel_through_files(tmp_path):
    for name in SETTINGS:
        method = pruning(name)
        method.save(tmp_path / "method.json")
        assert Method.load(tmp_path / "method.json") == method
        assert copy.deepcopy(method) == method


def test_settings_on_the_command_line():
    assert method_from_spec("inflection") == vtp.InflectionPruning()
    spec = "inflection:source=none,llm_layers=2+4,visual_keep=knee,text_keep=3,max_keep=none"
    assert method_from_spec(spec) == vtp.InflectionPruning(
        None, llm_layers=(2, 4), visual_keep="knee", text_keep=3
    )
    spec = "inflection:llm_layers=,score_without_rope=false,mass=0.5,rule=mass,max_keep=9"
    assert method_from_spec(spec) == vtp.InflectionPruning(
        llm_layers=(), score_without_rope=False, mass=0.5, rule="mass", max_keep=9
    )
    for wrong in ("inflection:keep=3", "inflection:rule"):
        with pytest.raises(ValueError, match="expected FIELD=VALUE with one of"):
            method_from_spec(wrong)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"source": "cls"}, ValueError, r"\.source: got 'cls', expected one of"),
        ({"rule": "elbow"}, ValueError, r"InflectionPruning\.rule must be one of"),
        ({"min_keep": 4, "max_keep": 3}, ValueError, r"InflectionPruning\.max_keep must be at"),
        ({"mass": 2.0}, ValueError, r"InflectionPruning\.mass must be within"),
        ({"llm_layers": 3}, TypeError, r"llm_layers: expected layers, as \(8, 16\), got 3"),
        ({"llm_layers": (0, 2)}, ValueError, "llm_layers: scores are those of the layer before"),
        ({"llm_layers": (4, 2)}, ValueError, "llm_layers: expected ascending layers"),
        ({"llm_layers": (2, "4")}, TypeError, "llm_layers: a layer is an int"),
        ({"visual_keep": "half"}, ValueError, "visual_keep: expected 'knee', a share or a number"),
        ({"text_keep": 1.5}, ValueError, "text_keep: a share lies between"),
        ({"protect_template": 1}, TypeError, "protect_template: expected a bool, got 1"),
        ({"template_tail": 0}, ValueError, "template_tail: expected at least 1, got 0"),
        ({"template_tail": 1.0}, TypeError, "template_tail: expected an int, got 1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, error, message):
    with pytest.raises(error, match=message):
        vtp.InflectionPruning(**settings)


def test_layers_the_model_does_not_have(models):
    with pytest.raises(ValueError, match=r"InflectionPruning\.llm_layers: there is no layer 8"):
        vtp.apply(models["sdpa"], vtp.InflectionPruning())
