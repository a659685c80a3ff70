"""Pruned generation equals a reference in which nothing is removed and pruned keys are masked."""

import copy

import pytest
import torch
from masked_reference import MaskedReference
from tiny_llava import BATCHES, ENCODES_FIRST, IMAGE, batch, one, prompt, three, tiny_llava
from transformers import DynamicCache, StaticCache

import vtp_kernels as vtp

GREEDY = {"max_new_tokens": 8, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
METHODS = {
    "fastv": (vtp.FastV(2, 0.5), {2: 0.5}, "last_token"),
    "count": (vtp.FastV(1, 5), {1: 5}, "last_token"),
    "pyramid": (
        vtp.PyramidDrop((1, 3, 5), (0.5, 0.25, 0.0)),
        {1: 0.5, 3: 0.25, 5: 0.0},
        "last_token",
    ),
    "text": (vtp.Schedule({2: 0.4, 3: 3}, score="text"), {2: 0.4, 3: 3}, "text"),
    "all": (vtp.Schedule({1: 1.0}), {1: 1.0}, "last_token"),
    "none": (vtp.Schedule({1: 0}), {1: 0}, "last_token"),
}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_llava(kind) for kind in ("sdpa", "eager")}


def assert_same(pruned, reference, tolerance=2e-5):
    assert torch.equal(pruned.sequences, reference.sequences)
    for a, b in zip(pruned.logits, reference.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def generate_both(models, attention, inputs, method, stages, score="last_token", **settings):
    """Outputs of the pruned model and of the reference, and the sets each kept."""
    settings = GREEDY | DETAILS | settings
    positions = settings.pop("positions", "original")
    with vtp.prune(models[attention], method, positions=positions) as run:
        pruned = models[attention].generate(**inputs, **settings)
    with MaskedReference(
        models["eager"], stages, score=score, contiguous=positions == "contiguous"
    ) as masked:
        reference = models["eager"].generate(**inputs, **settings)
    return pruned, reference, run.report().kept, masked.kept


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_greedy(models, name, attention, inputs):
    method, stages, score = METHODS[name]
    pruned, reference, kept, expected = generate_both(
        models, attention, BATCHES[inputs](), method, stages, score
    )
    assert kept.keys() == expected.keys()
    for layer in kept:
        assert torch.equal(kept[layer], expected[layer]), f"layer {layer}"
    assert_same(pruned, reference)


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2])
def test_random_pruning(models, layer, attention, inputs):
    model, inputs = models[attention], BATCHES[inputs]()
    with vtp.prune(model, vtp.RandomPruning(layer, 0.3, seed=5)) as run:
        pruned = model.generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    with MaskedReference(models["eager"], {layer: 0.3}, given=kept):
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    assert_same(pruned, reference)


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_contiguous_positions(models, attention, inputs):
    pruned, reference, _, _ = generate_both(
        models,
        attention,
        BATCHES[inputs](),
        vtp.PyramidDrop((1, 3), (0.5, 0.25)),
        {1: 0.5, 3: 0.25},
        positions="contiguous",
    )
    assert_same(pruned, reference)


def test_contiguous_positions_from_layer_0(models):
    inputs = three()
    method = vtp.RandomPruning(0, 0.3)
    with vtp.prune(models["sdpa"], method, positions="contiguous") as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    with MaskedReference(models["eager"], {0: 0.3}, given=kept, contiguous=True):
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    assert_same(pruned, reference)


PADDING_CHANGES = {
    # 11 rows of text each, but one image and two: 4 tokens of either leave no padding
    "goes": ([(1, 5), (2, 3)], 4),
    # 40 rows each, but one image and two: half of them are 8 and 16
    "comes": ([(1, 18), (2, 0)], 0.5),
}


@pytest.mark.parametrize("change", PADDING_CHANGES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_that_comes_or_goes_with_pruning(models, attention, change):
    prompts, keep = PADDING_CHANGES[change]
    inputs = batch(*(prompt(*spec, seed) for seed, spec in enumerate(prompts)))
    assert bool(inputs["attention_mask"].all()) == (change == "comes")
    pruned, reference, kept, expected = generate_both(
        models, attention, inputs, vtp.FastV(2, keep), {2: keep}
    )
    assert torch.equal(kept[2], expected[2])
    assert len(set(kept[2].sum(1).tolist())) == (2 if change == "comes" else 1)
    assert_same(pruned, reference)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_text_models(text):
    models = {kind: tiny_llava(kind, text=text) for kind in ("sdpa", "eager")}
    pruned, reference, kept, expected = generate_both(
        models, "sdpa", three(), vtp.FastV(2, 0.5), {2: 0.5}
    )
    assert torch.equal(kept[2], expected[2])
    assert_same(pruned, reference)


# --- keep-all is the untouched model, to the bit ------------------------------------------------


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keep_all_is_bit_identical(attention, dtype, inputs):
    model, inputs = tiny_llava(attention, dtype=dtype), BATCHES[inputs]()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.Schedule({1: 1.0, 2: 1.0, 4: 1.0})) as run:
        kept_all = model.generate(**inputs, **GREEDY, **DETAILS)
    assert all(mask.equal(inputs["attention_mask"].bool()) for mask in run.report().kept.values())
    assert torch.equal(untouched.sequences, kept_all.sequences)
    for a, b in zip(untouched.logits, kept_all.logits, strict=True):
        assert torch.equal(a, b)
    pairs = zip(untouched.past_key_values.layers, kept_all.past_key_values.layers, strict=True)
    real = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, 7), value=True)
    for a, b in pairs:  # padding rows hold what their zeros became
        assert torch.equal(a.keys.transpose(1, 2)[real], b.keys.transpose(1, 2)[real])
        assert torch.equal(a.values.transpose(1, 2)[real], b.values.transpose(1, 2)[real])


def test_no_image_passes_untouched(models):
    model, inputs = models["sdpa"], batch(prompt(0, 5, 0), prompt(0, 9, 1))
    untouched = model.generate(**inputs, **GREEDY, **DETAILS)
    with vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        output = model.generate(**inputs, **GREEDY, **DETAILS)
        with pytest.raises(RuntimeError, match="nothing to report"):
            run.report()
    assert type(output.past_key_values) is DynamicCache
    assert all(torch.equal(a, b) for a, b in zip(untouched.logits, output.logits, strict=True))


def test_a_prompt_keeps_the_same_alone_and_in_a_batch(models):
    prompts = [prompt(1, 9, 0), prompt(2, 3, 1), prompt(3, 6, 2)]
    together = batch(*prompts)
    pictures = together["pixel_values"].split([1, 2, 3])
    for method in (vtp.PyramidDrop((2, 4), (0.5, 0.25)), vtp.RandomPruning(0, 0.4, seed=3)):
        with vtp.prune(models["sdpa"], method) as run:
            models["sdpa"].generate(**together, **GREEDY)
            kept = run.report().kept
            for row, tokens in enumerate(prompts):
                alone = batch(tokens) | {"pixel_values": pictures[row]}
                models["sdpa"].generate(**alone, **GREEDY)
                for layer, mask in run.report().kept.items():
                    assert torch.equal(kept[layer][row, -len(tokens) :], mask[0])


# --- ways of decoding ---------------------------------------------------------------------------

STAGES = {1: 0.5, 3: 0.25}
METHOD = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))


@pytest.mark.parametrize("inputs", BATCHES)
def test_beam_search(models, inputs):
    inputs = BATCHES[inputs]()
    if not ENCODES_FIRST and len(inputs["input_ids"]) > 1:
        inputs = batch(prompt(1, 9, 0), prompt(1, 3, 1))
    pruned, reference, _, _ = generate_both(
        models, "sdpa", inputs, METHOD, STAGES, num_beams=3, num_return_sequences=2
    )
    assert torch.equal(pruned.sequences, reference.sequences)


@pytest.mark.parametrize("inputs", BATCHES)
def test_sampling(models, inputs):
    settings = GREEDY | DETAILS | {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(11)
    with vtp.prune(models["sdpa"], METHOD):
        pruned = models["sdpa"].generate(**BATCHES[inputs](), **settings)
    torch.manual_seed(11)
    with MaskedReference(models["eager"], STAGES):
        reference = models["eager"].generate(**BATCHES[inputs](), **settings)
    assert_same(pruned, reference)


@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("method", [METHOD, vtp.RandomPruning(0, 0.3)], ids=["pyramid", "random"])
def test_static_cache(models, method, inputs):
    inputs = BATCHES[inputs]()
    for attention in ("sdpa", "eager"):
        with vtp.prune(models[attention], method):
            dynamic = models[attention].generate(**inputs, **GREEDY, **DETAILS)
            static = models[attention].generate(
                **inputs, **GREEDY, **DETAILS, cache_implementation="static"
            )
        assert isinstance(static.past_key_values, StaticCache)
        assert_same(static, dynamic)


def test_static_cache_used_again_after_reset(models):
    model, inputs = models["sdpa"], three()
    cache = StaticCache(config=model.config, max_cache_len=96)
    settings = GREEDY | DETAILS | {"past_key_values": cache}
    untouched = model.generate(**inputs, **settings)
    cache.reset()
    with vtp.prune(model, METHOD):
        first = model.generate(**inputs, **settings)
        cache.reset()
        second = model.generate(**inputs, **settings)
    cache.reset()
    assert type(cache) is StaticCache
    again = model.generate(**inputs, **settings)
    assert_same(first, second, tolerance=0)
    assert_same(untouched, again, tolerance=0)
    assert not torch.equal(first.logits[0], untouched.logits[0])


@pytest.mark.parametrize("draft", ["assistant", "lookup"])
@pytest.mark.parametrize("method", [METHOD, vtp.RandomPruning(0, 0.3)], ids=["pyramid", "random"])
def test_assisted_decoding_equals_greedy(models, method, draft):
    model, inputs = models["sdpa"], one()
    settings = {"prompt_lookup_num_tokens": 4}
    if draft == "assistant":
        settings = {"assistant_model": tiny_llava(num_hidden_layers=2, seed=5)}
    with vtp.prune(model, method) as run:
        greedy = model.generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        assisted = model.generate(**inputs, **GREEDY, **DETAILS, **settings)
        for layer, mask in run.report().kept.items():  # the drafts of the first step come after
            assert torch.equal(mask[:, : kept[layer].shape[1]], kept[layer])
    assert_same(assisted, greedy)


def test_without_a_cache_each_step_is_a_prompt_of_its_own(models):
    model, inputs = models["sdpa"], three()
    with vtp.prune(model, METHOD):
        cached = model.generate(**inputs, **GREEDY, **DETAILS)
        output = model.generate(**inputs, **GREEDY, **DETAILS, use_cache=False)
    torch.testing.assert_close(output.logits[0], cached.logits[0], rtol=0, atol=2e-5)
    with MaskedReference(models["eager"], STAGES):
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS, use_cache=False)
    assert_same(output, reference)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_inputs_embeds(models, attention):
    model, inputs = models[attention], three()
    with vtp.prune(model, METHOD) as run:
        expected = model.generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        output = model.generate(**inputs, **GREEDY, **DETAILS)
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer])
    for a, b in zip(output.logits, expected.logits, strict=True):
        assert torch.equal(a, b)


# --- conversations ------------------------------------------------------------------------------


def next_turn(sequences, mask, turns):
    """Left-padded further text behind each conversation, padding in the middle and all."""
    width = max(map(len, turns))
    ids = torch.zeros(len(turns), width, dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, tokens in enumerate(turns):
        ids[row, width - len(tokens) :] = tokens
        real[row, width - len(tokens) :] = 1
    generated = sequences.shape[1] - mask.shape[1]
    mask = torch.cat((torch.nn.functional.pad(mask, (0, generated), value=1), real), dim=1)
    return {"input_ids": torch.cat((sequences, ids), dim=1), "attention_mask": mask}


def leave_out_endings(mask, start):
    """Mask the ends of answers that begin in column `start`, as where those of a batch end early
    and generate() fills them up: prompt b's b + 2 tokens early."""
    end = start + GREEDY["max_new_tokens"]
    for b in range(len(mask)):
        mask[b, max(end - b - 2, start + 1) : end] = 0


CONVERSATION = {
    "pyramid": (METHOD, STAGES),
    "random": (vtp.RandomPruning(0, 0.3), {0: 0.3}),
}


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", CONVERSATION)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_further_turn_of_text(models, attention, name, positions):
    method, stages = CONVERSATION[name]
    inputs = three()
    turns = [prompt(0, n, seed=n) for n in (2, 5, 0, 7)]
    with vtp.prune(models[attention], method, positions=positions) as run:
        first = models[attention].generate(**inputs, **GREEDY, **DETAILS)
        kept = run.report().kept
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        cache = copy.deepcopy(first.past_key_values)
        second = models[attention].generate(**more, past_key_values=cache, **GREEDY, **DETAILS)
    contiguous = positions == "contiguous"
    given = kept if name == "random" else None
    with MaskedReference(models["eager"], stages, given=given, contiguous=contiguous):
        expected = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
        assert_same(first, expected)
        expected = models["eager"].generate(
            **more, past_key_values=expected.past_key_values, **GREEDY, **DETAILS
        )
    assert_same(second, expected)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("first_images", [0, 1])
def test_a_further_turn_with_an_image(models, attention, first_images, positions):
    inputs = batch(*(prompt(first_images, n, seed=n) for n in (3, 8, 5)))
    turns = [prompt(1, 2, seed=7), prompt(2, 6, seed=8), prompt(0, 4, seed=9)]
    pictures = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    with vtp.prune(models[attention], METHOD, positions=positions) as run:
        first = models[attention].generate(**inputs, **GREEDY, **DETAILS)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        # generate() itself wants as many pictures as there are placeholders in the new turn.
        second = models[attention].generate(
            **more,
            pixel_values=pictures,
            past_key_values=first.past_key_values,
            **GREEDY,
            **DETAILS,
        )
        kept = run.report().kept
    contiguous = positions == "contiguous"
    with MaskedReference(models["eager"], STAGES, contiguous=contiguous) as masked:
        expected = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
        expected = models["eager"].generate(
            **more,
            pixel_values=pictures,
            past_key_values=expected.past_key_values,
            **GREEDY,
            **DETAILS,
        )
    for layer in kept:
        assert torch.equal(kept[layer], masked.kept[layer])
    assert_same(second, expected)


def test_one_pruned_prompt_many_questions(models):
    """The prefix-caching pattern: the cache of a prompt is copied for every question."""
    model, prefix = models["sdpa"], batch(prompt(1, 2, 0))
    with vtp.prune(model, METHOD), torch.no_grad():
        cache = model(**prefix).past_key_values
        answers = []
        for seed in (4, 5, 4):
            ids = torch.cat((prefix["input_ids"], prompt(0, 3, seed)[None]), dim=1)
            answers.append(
                model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **GREEDY)
            )
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_plain_calls_by_position(models):
    model, inputs = models["sdpa"], one()
    with vtp.prune(model, METHOD), torch.no_grad():
        by_name = model(**inputs).logits
        by_position = model(
            inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
        ).logits
    assert torch.equal(by_name, by_position)
    assert by_name.shape[1] == inputs["input_ids"].shape[1] - 12  # 16 visual tokens, 4 of them kept


def test_visual_tokens_whose_logits_are_asked_for_stay(models):
    inputs = one()
    end = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    inputs = {key: value[:, :end] for key, value in inputs.items() if key != "pixel_values"} | {
        "pixel_values": inputs["pixel_values"]
    }
    with vtp.prune(models["sdpa"], vtp.Schedule({1: 0})) as run:
        models["sdpa"].generate(**inputs, **GREEDY)
    kept = run.report().kept[1][0]
    assert kept.tolist() == [True] * 4 + [False] * 15 + [True]
