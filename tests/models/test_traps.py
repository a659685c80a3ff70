"""Ways in which pruning inside transformers goes wrong unnoticed, with a test for each."""

import copy
import pickle

import pytest
import torch
from masked_reference import MaskedReference
from tiny_llava import DEPTH, ENCODES_FIRST, batch, one, prompt, three, tiny_llava
from tiny_models import FAMILIES
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import vtp_kernels as vtp
from vtp_kernels.contract.passive import PassiveVisual

GREEDY = {"max_new_tokens": 6, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
STAGES = {2: 0.5, 4: 0.25}
METHOD = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))


@pytest.fixture(scope="module")
def model():
    return tiny_llava("sdpa")


@pytest.fixture(scope="module")
def eager():
    return tiny_llava("eager")


def what_layers_get(model, run):
    """Keyword arguments of every decoder layer during `run()`, in order of the calls."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module.layer_idx, dict(kwargs))),
            with_kwargs=True,
        )
        for layer in model.model.language_model.layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Everything(vtp.InflectionPruning):
    """Rows leave, the vision tower is watched, and a module stands in for an attention."""

    def passive_layers(self, depth):
        return {0: PassiveVisual("merge", "skip", renormalize=True)}


def test_trap_1_compiled_before_pruning():
    method = Everything("attention", llm_layers=(2,))
    model, inputs = tiny_llava("sdpa", num_hidden_layers=3), one()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, dense)
        with vtp.prune(compiled, method):  # the wrapper may be given as well as the model
            expected = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, expected)
        assert expected.shape != dense.shape
        torch.testing.assert_close(compiled(**inputs).logits, dense)


def test_trap_1_compiled_decoding_with_a_static_cache():
    settings = GREEDY | DETAILS | {"cache_implementation": "static"}
    model, inputs = tiny_llava("sdpa", num_hidden_layers=3), three()
    with vtp.prune(model, vtp.FastV(1)):
        expected = model.generate(**inputs, **settings)
        model.forward = torch.compile(model.forward, backend="eager")
        output = model.generate(**inputs, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    for a, b in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [one, three])
def test_trap_2_gapped_positions_without_a_cache(model, eager, make):
    inputs = make()
    with vtp.prune(model, METHOD) as run, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    with MaskedReference(eager, STAGES), torch.no_grad():
        expected = eager(**inputs, use_cache=False).logits
    for row, kept in enumerate(run.report().kept[4]):
        n = int(kept.sum())
        torch.testing.assert_close(logits[row, -n:], expected[row, kept], rtol=0, atol=2e-5)


def test_trap_3_flash_attention_sees_no_packed_sequences(model):
    with vtp.prune(model, METHOD):
        seen = what_layers_get(model, lambda: model.generate(**one(), **GREEDY))
    for layer, arguments in seen[:DEPTH]:
        positions = arguments["position_ids"]
        assert not _is_packed_sequence(positions, batch_size=1)
        assert (positions is None) == (layer >= 2)


def test_trap_4_drafts_are_not_the_last_token(model):
    """Assisted decoding appends drafts to the prompt and asks for the logits of drafts + 1."""
    inputs = one()
    drafted = {
        **inputs,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
    }
    drafted["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=7)
    with vtp.prune(model, METHOD) as run, torch.no_grad():
        model(**inputs, logits_to_keep=1)
        kept = run.report().kept
        logits = model(**drafted, logits_to_keep=4).logits
        with_drafts = run.report().kept
        model(**drafted, logits_to_keep=1)
        otherwise = run.report().kept
    width = inputs["input_ids"].shape[1]
    assert logits.shape[1] == 4
    assert all(torch.equal(with_drafts[layer][:, :width], kept[layer]) for layer in kept)
    assert any(not torch.equal(otherwise[layer][:, :width], kept[layer]) for layer in kept)


def test_trap_5_cache_made_inside_the_text_model(model):
    inputs = three()
    with vtp.prune(model, METHOD), torch.no_grad():
        inside = model(**inputs, use_cache=True)
        outside = model(**inputs, use_cache=True, past_key_values=DynamicCache(config=model.config))
        token = torch.full((4, 1), 5)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        steps = [
            model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)
            for output in (inside, outside)
        ]
    assert torch.equal(steps[0].logits, steps[1].logits)
    lengths = [layer.keys.shape[2] for layer in inside.past_key_values.layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4] == lengths[5]


def test_trap_6_plain_decoding_with_a_short_layer_0(model, eager):
    """Positions count what the model was given, not what layer 0 holds."""
    inputs, method = one(), vtp.RandomPruning(0, 0.25)
    with vtp.prune(model, method) as run, torch.no_grad():
        cache = model(**inputs).past_key_values
        step = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - 12 + 1
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1
    with MaskedReference(eager, {0: 0.25}, given=run.report().kept), torch.no_grad():
        cache = eager(**inputs).past_key_values
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1).long()
        expected = eager(
            input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache
        ).logits
    torch.testing.assert_close(step, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trap_7_masks_of_static_caches(attention):
    """generate() hands over a ready 4D mask, whose padding has to be found on its diagonal."""
    model, inputs = tiny_llava(attention), three()
    with vtp.prune(model, METHOD) as run:
        model.generate(**inputs, **GREEDY)
        expected = run.report().kept
        model.generate(**inputs, **GREEDY, cache_implementation="static")
        for layer, kept in run.report().kept.items():
            assert torch.equal(kept, expected[layer])


def test_trap_7_a_mask_of_ones_is_as_good_as_none(model):
    """generate() leaves it out, or not, depending on the version of transformers."""
    inputs = one()
    with vtp.prune(model, METHOD), torch.no_grad():
        logits = [
            model(**inputs | {"attention_mask": mask}).logits
            for mask in (inputs["attention_mask"], None)
        ]
    assert torch.equal(*logits)


def test_trap_8_attention_without_a_mask_function():
    AttentionInterface.register("sdpa_without_masks", sdpa_attention_forward)
    model = tiny_llava("sdpa")
    model.set_attn_implementation({"text_config": "sdpa_without_masks"})
    reference = tiny_llava("sdpa")
    with vtp.prune(model, METHOD), vtp.prune(reference, METHOD):
        output = model.generate(**one(), **GREEDY)
        assert torch.equal(output, reference.generate(**one(), **GREEDY))
        with pytest.raises(NotImplementedError, match="AttentionMaskInterface"):
            model.generate(**three(), **GREEDY)


def test_trap_9_labels(model):
    inputs = one()
    with vtp.prune(model, METHOD):
        with pytest.raises(ValueError, match="labels"):
            model(**inputs, labels=inputs["input_ids"])


def test_trap_9_labels_without_images_are_fine(model):
    inputs = batch(prompt(0, 6, 0))
    expected = model(**inputs, labels=inputs["input_ids"]).loss
    with vtp.prune(model, METHOD):
        assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, expected)


def test_trap_9_output_attentions(eager):
    with vtp.prune(eager, METHOD):
        with pytest.raises(ValueError, match="output_attentions"):
            eager.generate(**one(), **GREEDY, **DETAILS, output_attentions=True)


def test_trap_9_hidden_states_have_each_layer_s_rows(model):
    inputs = one()
    with vtp.prune(model, METHOD) as run, torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    rows = [tokens for (tokens,) in run.report().tokens_per_layer]
    # What enters layers 2 and 4 is shown as the layer before left it, with nothing gone yet.
    assert [state.shape[1] for state in states[1:-1]] == rows[:-1]


@pytest.mark.parametrize("size", [8, 16, 24])
def test_trap_10_chunked_prefill(model, size):
    settings = GREEDY | {"prefill_chunk_size": size}
    dense = model.generate(**one(), **settings)
    with vtp.prune(model, METHOD):
        if not ENCODES_FIRST:  # no picture reaches the model, so nothing is pruned
            assert torch.equal(model.generate(**one(), **settings), dense)
            return
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**one(), **settings)


def test_trap_4_drafts_that_no_argument_tells_of():
    """Where forward knows no logits_to_keep, the last draft would be taken for the prompt's end."""
    family = FAMILIES["video_llama_3"]
    model = family.model("sdpa")
    inputs = family.batch(model, ((0,), 5))
    with vtp.prune(model, METHOD):
        with pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens: drafts come with"):
            model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
        model.generate(**inputs, **GREEDY)
        with pytest.raises(NotImplementedError, match="logits_to_keep: the forward of VideoLl"):
            model(**inputs, logits_to_keep=torch.tensor([3]))


def test_what_a_layer_is_told_of_each_row_is_of_every_row():
    family = FAMILIES["ernie4_5_vl_moe"]
    model = family.model("sdpa")
    inputs = family.batch(model, ((0,), 5))
    inputs["moe_mm_token_type_ids"] = inputs["moe_mm_token_type_ids"][:, 1:]
    with (
        torch.no_grad(),
        vtp.prune(model, vtp.RandomPruning(0, 0.5)),
        pytest.raises(ValueError, match=r"moe_mm_token_type_ids: expected .*, got"),
    ):
        model(**inputs)


def test_trap_11_inputs_embeds(model):
    inputs = one()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with vtp.prune(model, METHOD) as run:
        model.generate(**inputs, **GREEDY)
    assert run.report().visual_tokens_per_layer == [[16]] * 2 + [[8]] * 2 + [[4]] * 2


def test_trap_12_validity_follows_beams(model):
    """Rows of different prompts swap places: keys and what is known of them must move together."""
    inputs = three()
    with vtp.prune(model, METHOD), torch.no_grad():
        cache = model(**inputs).past_key_values
        order = torch.tensor([2, 0, 3, 1])
        moved = copy.deepcopy(cache)
        moved.reorder_cache(order)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        token = torch.full((4, 1), 5)
        positions = mask.sum(1, keepdim=True) - 1
        step = model(
            input_ids=token, attention_mask=mask, past_key_values=cache, position_ids=positions
        )
        swapped = model(
            input_ids=token,
            attention_mask=mask[order],
            past_key_values=moved,
            position_ids=positions[order],
        )
    torch.testing.assert_close(swapped.logits, step.logits[order], rtol=0, atol=2e-5)


def test_trap_12_what_the_tower_saw_follows_beams(model):
    """Every beam of a prompt keeps what its prompt keeps alone."""
    inputs = batch(prompt(1, 9, 0), prompt(1, 3, 1))
    with vtp.prune(model, vtp.InflectionPruning("attention", llm_layers=(2,))) as run:
        model.generate(**inputs, **GREEDY)
        kept = run.report().kept
        model.generate(**inputs, **GREEDY, num_beams=3)
    assert not torch.equal(kept[0][0], kept[0][1])
    for layer, mask in run.report().kept.items():
        assert torch.equal(mask, kept[layer].repeat_interleave(3, dim=0))


def test_trap_13_nothing_of_a_call_stays_on_the_pruner(model):
    """State lives on the call and the cache: two conversations may take turns."""
    first, second = batch(prompt(1, 3, 0)), batch(prompt(2, 8, 1))
    token = {"input_ids": torch.tensor([[5]])}

    def steps(cache):
        return [model(**token, past_key_values=cache).logits for _ in range(3)]

    with vtp.prune(model, METHOD), torch.no_grad():
        alone = [steps(model(**inputs).past_key_values) for inputs in (first, second)]
        caches = [model(**inputs).past_key_values for inputs in (first, second)]
        turns = [[model(**token, past_key_values=c).logits for c in caches] for _ in range(3)]
    for i in range(2):
        for step in range(3):
            assert torch.equal(alone[i][step], turns[step][i])


def test_trap_14_masks_are_shared_and_absent_without_padding(model):
    with vtp.prune(model, METHOD):
        for _, arguments in what_layers_get(model, lambda: model.generate(**one(), **GREEDY)):
            assert arguments["attention_mask"] is None
        seen = what_layers_get(model, lambda: model.generate(**three(), **GREEDY))
    for step in range(GREEDY["max_new_tokens"]):
        masks = [arguments["attention_mask"] for _, arguments in seen[step * DEPTH :][:DEPTH]]
        assert masks[2] is masks[3] and masks[4] is masks[5]
        assert masks[0].shape[-1] > masks[2].shape[-1] > masks[4].shape[-1]


def test_padding_on_the_right_is_refused(model):
    inputs = batch(prompt(1, 3, 0), prompt(1, 6, 1))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    inputs["input_ids"][0] = torch.roll(inputs["input_ids"][0], -3)
    with vtp.prune(model, METHOD), pytest.raises(ValueError, match="left padding"):
        model(**inputs)


def test_other_calls_that_are_refused(model):
    inputs = one()
    square = torch.ones(1, 1, *[inputs["input_ids"].shape[1]] * 2).bool().tril()
    with vtp.prune(model, METHOD):
        with pytest.raises(NotImplementedError, match="4D mask"):
            model(**inputs | {"attention_mask": square})
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
            model(**inputs, cu_seq_lens_q=torch.tensor([0, 4]))
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            model(**inputs)


def test_caches_that_are_refused(model):
    class OddLayer(DynamicCache(config=model.config).layers[0].__class__):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers[3] = OddLayer()
    with vtp.prune(model, METHOD), pytest.raises(NotImplementedError, match="OddLayer"):
        model.generate(**one(), **GREEDY, past_key_values=cache)


def test_a_static_cache_takes_no_second_image(model):
    settings = GREEDY | DETAILS | {"cache_implementation": "static"}
    with vtp.prune(model, METHOD):
        first = model.generate(**one(), **settings, max_length=None)
        cache = first.past_key_values
        ids = torch.cat((first.sequences, prompt(1, 2, 3)[None]), dim=1)
        with pytest.raises(NotImplementedError, match="StaticCache"):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=one()["pixel_values"],
                past_key_values=cache,
                **GREEDY,
            )


def test_caches_can_be_pickled(model):
    inputs = three()
    with vtp.prune(model, METHOD), torch.no_grad():
        cache = model(**inputs).past_key_values
        again = pickle.loads(pickle.dumps(cache))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        token = torch.full((4, 1), 5)
        steps = [
            model(input_ids=token, attention_mask=mask, past_key_values=c) for c in (cache, again)
        ]
    assert torch.equal(steps[0].logits, steps[1].logits)
