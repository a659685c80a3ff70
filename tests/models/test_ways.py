"""Every method in every way to generate: each way says what plain greedy decoding says.

And greedy decoding says what a reference says in which nothing leaves (test_generation.py,
test_families.py and test_visipruner.py; here for each method whose whole effect is that rows leave,
in float32 and bfloat16).
"""

import copy

import pytest
import torch
from compiled_decoding import Graphs, compiled_decoding
from masked_reference import MaskedReference
from merged_rows import noting_content
from pruning_methods import MERGING, NAMES, ONLY_ROWS_LEAVE, pruning_method
from test_generation import DETAILS, GREEDY, assert_same, next_turn
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava

import vtp_kernels as vtp

BATCHES = {"one": one, "padded": three}
NO_IMAGE = {"suppress_tokens": [IMAGE]}  # where generated tokens go back in as a prompt


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_llava(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module", params=(*NAMES, *MERGING))
def method(request, models, tmp_path_factory):
    return pruning_method(request.param, models["sdpa"], tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="module")
def run(models, method):
    """The model with the method at work; every other test here is done with it."""
    with vtp.prune(models["sdpa"], method) as handle:
        yield handle


@pytest.fixture(scope="module")
def greedy(models, run):
    """{batch: (what plain greedy decoding says, what it kept)}"""
    found = {}
    for name, make in BATCHES.items():
        output = models["sdpa"].generate(**make(), **GREEDY, **DETAILS, **NO_IMAGE)
        found[name] = output, run.report().kept
    return found


def generate(models, inputs, **settings):
    settings = GREEDY | DETAILS | NO_IMAGE | settings
    return models["sdpa"].generate(**inputs, **settings)


def assert_kept(kept, expected):
    assert kept.keys() == expected.keys()
    for layer, mask in expected.items():
        assert torch.equal(kept[layer][:, : mask.shape[1]], mask)


@pytest.mark.parametrize("inputs", BATCHES)
def test_static_cache(models, run, greedy, inputs):
    expected, kept = greedy[inputs]
    output = generate(models, BATCHES[inputs](), cache_implementation="static")
    assert_same(output, expected)
    assert_kept(run.report().kept, kept)


@pytest.mark.parametrize("inputs", BATCHES)
def test_inputs_embeds(models, run, greedy, inputs):
    expected, kept = greedy[inputs]
    given = BATCHES[inputs]()
    given["inputs_embeds"] = models["sdpa"].get_input_embeddings()(given.pop("input_ids"))
    output = generate(models, given)
    for a, b in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert_kept(run.report().kept, kept)


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_drafts(models, run, greedy, way):
    expected, kept = greedy["one"]
    settings = {"prompt_lookup_num_tokens": 4}
    if way == "assistant":
        settings = {"assistant_model": tiny_llava(num_hidden_layers=2, seed=5)}
    assert_same(generate(models, one(), **settings), expected)
    assert_kept(run.report().kept, kept)


@pytest.mark.parametrize("inputs", BATCHES)
def test_samples(models, run, inputs):
    """Three samples of a prompt are what three copies of the prompt are."""
    given = BATCHES[inputs]()
    settings = {"do_sample": True, "max_new_tokens": 6}
    torch.manual_seed(3)
    samples = generate(models, given, num_return_sequences=3, **settings)
    copies = {k: v.repeat_interleave(3, 0) for k, v in given.items() if k != "pixel_values"}
    pictures = (given["input_ids"] == IMAGE).sum(1) // 16
    parts = given["pixel_values"].split(pictures.tolist())
    copies["pixel_values"] = torch.cat([part for part in parts for _ in range(3)])
    torch.manual_seed(3)
    assert_same(samples, generate(models, copies, **settings))


def test_beams(models, run):
    """Beams of a batch are those of its prompts alone."""
    prompts = (prompt(1, 9, 0), prompt(1, 4, 1))
    together = batch(*prompts)
    sequences = generate(models, together, num_beams=3).sequences[:, -8:]
    for b, ids in enumerate(prompts):
        alone = {"input_ids": ids[None], "pixel_values": together["pixel_values"][b : b + 1]}
        assert torch.equal(generate(models, alone, num_beams=3).sequences[0, -8:], sequences[b])


@pytest.mark.parametrize("inputs", BATCHES)
def test_without_a_cache_each_step_is_a_prompt_of_its_own(models, run, greedy, inputs):
    model, given = models["sdpa"], BATCHES[inputs]()
    output = generate(models, given, use_cache=False, max_new_tokens=3)
    torch.testing.assert_close(output.logits[0], greedy[inputs][0].logits[0], rtol=0, atol=2e-5)
    for step in range(3):
        ids = output.sequences[:, : given["input_ids"].shape[1] + step]
        mask = torch.nn.functional.pad(given["attention_mask"], (0, step), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        with torch.no_grad():
            logits = model(
                **given | {"input_ids": ids, "attention_mask": mask},
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
            ).logits
        torch.testing.assert_close(logits[:, -1], output.logits[step], rtol=0, atol=2e-5)


@pytest.mark.parametrize("inputs", BATCHES)
def test_a_further_turn(models, run, greedy, inputs):
    """A turn on a returned cache is the same on a copy of it, and token by token."""
    model, given = models["sdpa"], BATCHES[inputs]()
    first = generate(models, given)
    turns = [prompt(0, 4, seed=n) for n in range(len(given["input_ids"]))]
    more = next_turn(first.sequences, given["attention_mask"], turns)
    second = generate(models, more, past_key_values=copy.deepcopy(first.past_key_values))
    cache, length = first.past_key_values, first.past_key_values.get_seq_length()
    with torch.no_grad():
        for end in range(length + 1, more["input_ids"].shape[1] + 1):
            mask = more["attention_mask"][:, :end]
            logits = model(
                input_ids=more["input_ids"][:, end - 1 : end],
                attention_mask=mask,
                position_ids=mask.cumsum(1)[:, -1:] - 1,
                past_key_values=cache,
            ).logits
    torch.testing.assert_close(logits[:, -1], second.logits[0], rtol=0, atol=2e-5)


def test_no_image_passes_untouched(models, run, greedy):
    given, before = batch(prompt(0, 5, 0), prompt(0, 9, 1)), str(run.report())
    output = generate(models, given)
    dense = tiny_llava("sdpa").generate(**given, **GREEDY, **DETAILS, **NO_IMAGE)
    assert_same(output, dense, tolerance=0)
    assert str(run.report()) == before


@pytest.mark.parametrize("method", (*NAMES, "visionzip"), indirect=True, scope="module")
def test_compiled_decoding(models, run, greedy):
    """One graph serves all steps, and the next prompt, if rows leave before the same layers."""
    expected, kept = greedy["padded"]
    graphs = Graphs()
    assert_same(generate(models, three(), **compiled_decoding()), expected)
    assert_kept(run.report().kept, kept)
    assert len(graphs) == 1
    others = batch(prompt(2, 9, 5), prompt(1, 7, 6), prompt(3, 6, 7), prompt(0, 8, 8), seed=3)
    assert_same(
        generate(models, others, **compiled_decoding()),
        generate(models, others, cache_implementation="static"),
    )
    assert len(graphs) == len({tuple(kept), tuple(run.report().kept)})


# --- beside a reference in which nothing leaves ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", (*ONLY_ROWS_LEAVE, *MERGING))
def test_rows_that_leave_are_as_if_masked(name, attention, dtype, tmp_path):
    model, eager = tiny_llava(attention, dtype=dtype), tiny_llava("eager", dtype=dtype)
    given = three()
    given["pixel_values"] = given["pixel_values"].to(dtype)
    method = pruning_method(name, model, tmp_path)
    with noting_content() as content, vtp.prune(model, method) as run:
        pruned = model.generate(**given, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert bool(content) == (name in MERGING)
    with MaskedReference(eager, dict.fromkeys(kept), given=kept, content=content):
        if dtype == torch.float32:
            assert_same(pruned, eager.generate(**given, **GREEDY, **DETAILS))
            return
        # Rounding may tip a token: the steps are compared on the tokens that were said.
        with torch.no_grad():
            cache = None
            for step, logits in enumerate(pruned.logits):
                end = given["input_ids"].shape[1] + step
                mask = torch.nn.functional.pad(given["attention_mask"], (0, step), value=1)
                fresh = {"input_ids": pruned.sequences[:, end - 1 : end]} if step else given
                output = eager(
                    **fresh | {"attention_mask": mask},
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -(1 if step else end) :],
                    past_key_values=cache,
                )
                cache = output.past_key_values
                error = (output.logits[:, -1] - logits).abs().max()
                assert error < 0.05 * logits.abs().max(), step
