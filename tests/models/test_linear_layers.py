"""Models in which some layers have linear attention: rows that left are as if they had never come.

Where rows leave before layer 0, that is the model itself, given the shorter input with the same
positions. Where they leave later, it is a loop over the layers, each of which gets what is left.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from linear_reference import Gathered, as_given, merged
from merged_rows import noting_content
from pruning_methods import pruning_method
from test_every_family import check_units
from test_generation import DETAILS, GREEDY, assert_same
from test_last_layer import last, rows_of
from test_packing import rows_computed
from tiny_llava import ENCODES_FIRST, IMAGE, tiny_llava
from tiny_models import LINEAR, VIDEO, words
from transformers.cache_utils import DynamicLayer

import vtp_kernels as vtp
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.models.attention.policy_attention import PolicyAttention
from vtp_kernels.models.attention.stand_ins import PassiveVisualAttention
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.keys.positions import POSITIONS
from vtp_kernels.models.masked_run import MaskedRun

SETTINGS = GREEDY | DETAILS | {"max_new_tokens": 4, "suppress_tokens": [IMAGE, VIDEO]}
ROUNDING = 1e-4  # the recurrence magnifies that of the batch
PROMPTS = (((0,), 9), ((1, 2), 3), ((2, 0, 1), 6), ((), 5))
PYRAMID, STAGES = vtp.PyramidDrop((2, 4), (0.5, 0.25)), {2: 0.5, 4: 0.25}


#: What holds of one kind of model is not shown of all.
ONE_FAMILY = pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)


@pytest.fixture(scope="module", params=LINEAR)
def family(request):
    return LINEAR[request.param]


@pytest.fixture(scope="module")
def models(family):
    return {kind: family.model(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def model(models):
    return models["sdpa"]


@pytest.fixture(scope="module")
def one(family, model):
    return family.batch(model, *PROMPTS[:1])


@pytest.fixture(scope="module")
def padded(family, model):
    return family.batch(model, *PROMPTS)


def prompts(model, inputs):
    """Embeddings, positions and real columns of each prompt."""
    hidden, positions = merged(model, inputs)
    for b, real in enumerate(inputs["attention_mask"].bool()):
        yield hidden[b], positions[:, b], real


def check(model, inputs, output, kept, stages=None, content=()):
    """That an output says of every prompt what the loop says, given the same tokens."""
    visual = inputs["input_ids"] == IMAGE
    for b, (hidden, positions, real) in enumerate(prompts(model, inputs)):
        talk = Gathered(model)
        given = None if stages else {layer: mask[b, real] for layer, mask in kept.items()}
        put = {layer: [x[b, real] for x in content[layer]] for layer in content}
        rows = hidden[real], positions[:, real], stages, given, visual[b, real], put
        logits = [talk.call(*rows)]
        for layer in kept:
            assert torch.equal(talk.kept[layer], kept[layer][b, real]), f"prompt {b}, {layer}"
        answer = output.sequences[b, len(real) :].tolist()
        logits += talk.tokens(answer[:-1], positions[:, -1:] + 1)
        got = torch.stack([step[b] for step in output.logits])
        torch.testing.assert_close(got, torch.stack(logits), rtol=0, atol=ROUNDING)


# --- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_before_layer_0_it_is_the_model_given_the_shorter_input(family, model, padded, positions):
    if positions not in family.page.positions:
        with pytest.raises(NotImplementedError, match="which do not close up"):
            vtp.apply(model, vtp.RandomPruning(0, 0.3), positions=positions)
        return
    with vtp.prune(model, vtp.RandomPruning(0, 0.3), positions=positions) as run:
        output = model.generate(**padded, **SETTINGS)
    kept = run.report().kept[0]
    assert (kept.sum(1) < padded["attention_mask"].sum(1)).any()
    for b, (hidden, places, _) in enumerate(prompts(model, padded)):
        given, here, cache = {"inputs_embeds": hidden[None, kept[b]]}, places[:, kept[b]], None
        if positions == "contiguous":
            here = torch.arange(here.shape[1]).expand(len(here), -1)
        answer = output.sequences[b, len(kept[b]) :]
        for step, token in enumerate(answer):
            dense = model(**given, position_ids=as_given(here), past_key_values=cache)
            got = output.logits[step][b]
            torch.testing.assert_close(got, dense.logits[0, -1], rtol=0, atol=ROUNDING)
            given, cache = {"input_ids": token[None, None]}, dense.past_key_values
            here = here[:, -1:] + 1


def test_between_layers_each_runs_on_what_is_left(models, padded):
    """After layers of full attention, whose weights choose."""
    with vtp.prune(models["sdpa"], PYRAMID) as run:
        output = models["sdpa"].generate(**padded, **SETTINGS)
    check(models["eager"], padded, output, run.report().kept, STAGES)


@ONE_FAMILY
@pytest.mark.parametrize("name", ["visionzip", "sparsevlm", "dart"])
def test_rows_that_take_in_others(models, padded, name, tmp_path):
    method = pruning_method(name, models["sdpa"], tmp_path)
    with noting_content() as noted, vtp.prune(models["sdpa"], method) as run:
        output = models["sdpa"].generate(**padded, **SETTINGS)
    content = {layer: (f.args[0][..., 0], f.args[1]) for layer, f in noted.items()}
    assert bool(content) == (name != "dart")
    check(models["eager"], padded, output, run.report().kept, content=content)


def test_keep_all_is_bit_identical(model, padded):
    untouched = model.generate(**padded, **SETTINGS)
    with vtp.prune(model, vtp.Schedule({0: 1.0, 1: 1.0, 4: 1.0}, score="random")):
        assert_same(model.generate(**padded, **SETTINGS), untouched, tolerance=0)
    assert_same(model.generate(**padded, **SETTINGS), untouched, tolerance=0)


@pytest.mark.parametrize("way", ["static", "no cache", "plain call"])
def test_ways_to_call(model, padded, way):
    with vtp.prune(model, PYRAMID), torch.no_grad():
        expected = model.generate(**padded, **SETTINGS)
        if way == "static":
            output = model.generate(**padded, **SETTINGS, cache_implementation="static")
            assert_same(output, expected, ROUNDING)
            return
        output = model(**padded, use_cache=way == "plain call")
    torch.testing.assert_close(output.logits[:, -1], expected.logits[0], rtol=0, atol=ROUNDING)


# --- one family, at length ----------------------------------------------------------------------


@ONE_FAMILY
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_prompt(models, one, attention):
    with vtp.prune(models[attention], PYRAMID) as run:
        output = models[attention].generate(**one, **SETTINGS)
    check(models["eager"], one, output, run.report().kept, STAGES)


@ONE_FAMILY
@pytest.mark.parametrize("name", ["lvpruning", "inflection", "contribution", "every layer"])
def test_rows_that_left_never_came(models, padded, name, tmp_path):
    """Before layers of either kind; who stays is taken over from the report."""
    model = models["sdpa"]
    if name == "lvpruning":
        method = pruning_method(name, model, tmp_path)
    else:
        method = {
            "inflection": vtp.InflectionPruning("attention", llm_layers=(2, 4), visual_keep="knee"),
            "contribution": vtp.Schedule({2: 0.6, 4: 3}, score="contribution"),
            "every layer": vtp.Schedule(
                {0: 0.9, 1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.0}, score="random"
            ),
        }[name]
    with vtp.prune(model, method) as run:
        output = model.generate(**padded, **SETTINGS)
    kept = run.report().kept
    assert any(not torch.equal(k, padded["attention_mask"].bool()) for k in kept.values())
    check(models["eager"], padded, output, kept)


@pytest.mark.parametrize(
    "family", [name for name in LINEAR if LINEAR[name].tiny.video], indirect=True, scope="module"
)
def test_videos(family, model):
    """Frames with timestamps, or markers, between them, beside pictures and text."""
    inputs = family.batch(model, ((0, (0,), 2), 4), (((0,),), 9), ((), 5))
    for layer in (0, 4):
        with vtp.prune(model, vtp.RandomPruning(layer, 0.25)) as run:
            output = model.generate(**inputs, **SETTINGS)
        report = run.report()
        check(model, inputs, output, report.kept)
        check_units(report, vtp.picture_grids(model, inputs))
        text = inputs["attention_mask"].bool() & ~report.kept.visual
        assert report.kept.visual.any(1).tolist() == [True, True, False]
        assert torch.equal(report.kept[layer] & text, text)


@ONE_FAMILY
@pytest.mark.skipif(not ENCODES_FIRST, reason="hands beams the wrong pictures, pruned or not")
def test_beams(model, models, padded):
    """A beam is worth what its tokens are, one after another: states go with their beams."""
    settings = SETTINGS | {"num_beams": 3, "output_scores": True, "length_penalty": 0.0}
    with vtp.prune(model, PYRAMID) as run:
        output = model.generate(**padded, **settings)
    kept = run.report().kept
    assert any(len(set(row.tolist())) > 1 for row in output.beam_indices)
    for b, (hidden, positions, real) in enumerate(prompts(models["eager"], padded)):
        talk, visual = Gathered(models["eager"]), padded["input_ids"][b, real] == IMAGE
        logits = [talk.call(hidden[real], positions[:, real], STAGES, visual=visual)]
        assert all(torch.equal(talk.kept[layer], kept[layer][3 * b, real]) for layer in kept)
        answer = output.sequences[b, len(real) :]
        logits += talk.tokens(answer[:-1].tolist(), positions[:, -1:] + 1)
        worth = torch.stack(logits).log_softmax(-1).gather(1, answer[:, None]).sum()
        torch.testing.assert_close(output.sequences_scores[b], worth, rtol=0, atol=1e-3)


@ONE_FAMILY
@pytest.mark.parametrize("stages", [{0: 0.5}, {2: 0.5, 4: 0.25}], ids=["before", "between"])
@torch.no_grad()
def test_a_conversation(family, models, stages):
    """A picture and an answer, a turn of text and an answer, and another picture."""
    model, talk = models["sdpa"], Gathered(models["eager"])
    first, second = (family.batch(model, ((i,), 4), seed=i) for i in (0, 1))
    width, turn = first["input_ids"].shape[1], words(5, torch.Generator().manual_seed(6))
    method = vtp.Schedule(stages, score="random" if 0 in stages else "last_token")
    embed, rows_and_places = model.get_input_embeddings(), merged(model, second)
    rows, positions, _ = next(prompts(model, first))
    place = int(positions[0, -1]) + 1 - width  # what to add to columns behind the picture
    with vtp.prune(model, method) as run:
        output = model.generate(**first, **SETTINGS)
        kept = run.report().kept
        ids = torch.cat((output.sequences, turn[None]), 1)
        types = torch.nn.functional.pad(first["mm_token_type_ids"], (0, ids.shape[1] - width))
        cache = output.past_key_values
        more = {"mm_token_type_ids": types, "past_key_values": cache}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **more, **SETTINGS)
        end = text.sequences.shape[1] - 1
        for layer in (0, 1):  # the model asks for its masks by the first layer that holds keys
            assert cache.get_query_offset(layer) == end
            assert cache.get_mask_sizes(1, layer) == (end + 1, 0)
        # The last word of the answer, and behind it the picture at the positions that follow.
        hidden, places = rows_and_places[0], rows_and_places[1] + place + end
        hidden[:, 0] = embed(text.sequences[:, -1])
        picture = second | {"position_ids": places, "attention_mask": None}
        picture["input_ids"][:, 0] = text.sequences[:, -1]
        last = model(**picture, past_key_values=cache).logits[0]
        again = run.report().kept

    def goes_on(output, logits, start):
        """From the logits of the prompt, which ends before column `start`."""
        answer, here = output.sequences[0, start:].tolist(), torch.full((3, 1), place + start)
        expected = torch.stack([logits, *talk.tokens(answer[:-1], here)])
        torch.testing.assert_close(torch.cat(output.logits), expected, rtol=0, atol=ROUNDING)

    goes_on(output, talk.call(rows, positions, given={k: x[0] for k, x in kept.items()}), width)
    start = output.sequences.shape[1] - 1
    positions = torch.arange(start, ids.shape[1]).expand(3, -1) + place
    goes_on(text, talk.call(embed(ids[0, start:]), positions), ids.shape[1])
    expected = talk.call(hidden[0], places[:, 0], given={k: x[0] for k, x in again.items()})
    torch.testing.assert_close(last[-1], expected, rtol=0, atol=ROUNDING)


# --- what else the engine does in such models -----------------------------------------------------


@ONE_FAMILY
@torch.no_grad()
def test_layers_run_on_as_few_rows_as_may_be(model, padded):
    """Those of full attention without the padding between prompts, the last on the rows whose
    logits are asked for."""
    with vtp.prune(model, PYRAMID) as run:
        rows = rows_computed(model, padded)
        totals = run.report().tokens_per_layer
        with rows_of(last(model).mlp) as few:
            model(**padded, logits_to_keep=1)
    assert few == [1]
    widths = [4 * max(layer) for layer in totals]
    assert rows == [*widths[:3], sum(totals[3]), widths[4], sum(totals[5])]
    assert sum(totals[3]) < widths[3]


@ONE_FAMILY
@pytest.mark.parametrize("stand_in", ["passive", "policy"])
@torch.no_grad()
def test_what_stands_in_for_attention_has_its_gate(models, stand_in):
    """Where nothing is passive, and nothing is let go, it is that attention."""
    text = models["eager"].model.language_model
    attention, hidden = text.layers[1].self_attn, torch.randn(2, 7, 64)
    given = {
        "position_embeddings": text.rotary_emb(hidden, torch.arange(7).expand(3, 2, -1)),
        "attention_mask": torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None],
    }
    expected, _ = attention(hidden, **given)
    if stand_in == "passive":
        stand_in = PassiveVisualAttention(attention, PassiveVisual("drop", "causal"))
        got, _ = stand_in(hidden, **given, visual=torch.zeros(2, 7, dtype=torch.bool))
    else:
        got, _ = PolicyAttention(attention)(hidden, **given, policy=torch.ones(2, 7))
    torch.testing.assert_close(got, expected)


@dataclass(frozen=True)
class SkipsAttention(vtp.RandomPruning):
    """In layer 1 all visual tokens but one skip attention, and leave no keys."""

    def passive_layers(self, depth):
        return {1: PassiveVisual("merge", "skip", renormalize=True)}


@ONE_FAMILY
def test_passive_tokens_of_the_first_layer_that_holds_keys(model, padded):
    with vtp.prune(model, SkipsAttention(4, 0.5)):
        expected = model.generate(**padded, **SETTINGS)
        static = model.generate(**padded, **SETTINGS, cache_implementation="static")
        anew = model.generate(**padded, **DETAILS, max_new_tokens=1, use_cache=False)
    assert_same(static, expected, ROUNDING)
    torch.testing.assert_close(anew.logits[0], expected.logits[0], rtol=0, atol=ROUNDING)
    keys, prompt = expected.past_key_values.layers[1].keys.shape[2], padded["input_ids"].shape[1]
    assert keys < prompt == expected.past_key_values.get_seq_length() - 3


@ONE_FAMILY
def test_the_report_counts_what_is_there(model, padded):
    with vtp.prune(model, PYRAMID) as run, torch.no_grad():
        cache = model(**padded).past_key_values
    report, prompts = run.report(), len(PROMPTS)
    full = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert [bool(sum(keys)) for keys in report.kv_tokens_per_layer] == [False, True] * 3
    per_key = 2 * full[0].keys[0, :, 0].numel() * 4
    assert report.kv_bytes == per_key * sum(map(sum, report.kv_tokens_per_layer))
    assert report.dense_kv_bytes == per_key * 3 * int(padded["attention_mask"].sum())
    for layer, keys in zip(full, report.kv_tokens_per_layer[1::2], strict=True):
        assert layer.keys.shape[2] == max(keys) and len(keys) == prompts
    gone = {layer: 0 for layer in (1, 3, 5)}
    dense = 0
    for text, *visual in zip(report.dense_tokens, *report.visual_tokens_per_layer, strict=True):
        text -= visual[0]
        for layer in gone:
            pairs = [n * text + n * (n + 1) // 2 for n in (visual[0], visual[layer])]
            dense, gone[layer] = dense + pairs[0], gone[layer] + pairs[0] - pairs[1]
    assert report.visual_attention_reduction == pytest.approx(sum(gone.values()) / dense)


@ONE_FAMILY
@torch.no_grad()
def test_a_cache_without_its_method_stays_as_it_is(model, padded):
    with vtp.prune(model, PYRAMID):
        cache = model(**padded, logits_to_keep=1).past_key_values
    before = copy.deepcopy(cache)
    mask = torch.nn.functional.pad(padded["attention_mask"], (0, 1), value=1)
    with pytest.raises(RuntimeError, match="no pruning method is at work"):
        model(torch.full((4, 1), 7), attention_mask=mask, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot crop a cache with linear attention"):
        cache.crop(-1)
    for layer, other in zip(cache.layers[::2], before.layers[::2], strict=True):
        assert torch.equal(layer.recurrent_states[0], other.recurrent_states[0])
        assert torch.equal(layer.conv_states[0], other.conv_states[0])


# --- what cannot be -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetful(vtp.RandomPruning):
    def forgetful_layers(self, depth):
        return (3, 4)


@ONE_FAMILY
@pytest.mark.parametrize(
    "method, what",
    [
        (vtp.FastV(layer=3), "looks at the attention of layer 2"),
        (vtp.VisiPruner(), "has visual tokens passive in the attention of layer 0"),
        (vtp.VisiPruner("middle", shallow_layers=0), "looks at the attention of layer 0"),
        (Forgetful(), "lets visual tokens leave the KV cache of layer 4"),
    ],
)
def test_linear_attention_cannot_be_looked_at(model, method, what):
    layers = r"Layers 1, 3, 5 have attention; .* before layers 2, 4$"
    with pytest.raises(ValueError, match=rf"qwen3_5.* cannot run .*{what}, .*{layers}"):
        vtp.apply(model, method)


@ONE_FAMILY
@torch.no_grad()
def test_what_padding_would_spoil_is_refused(model, one, padded):
    """Behind something, linear attention takes padding in: prompts might keep different numbers."""
    with vtp.prune(model, PYRAMID):
        for inputs in (padded, one):
            cache = model(**inputs, logits_to_keep=1).past_key_values
            mask = torch.cat((inputs["attention_mask"], inputs["attention_mask"]), 1)
            if inputs is one:
                mask[0, one["input_ids"].shape[1]] = 0
            again = inputs | {"attention_mask": mask}
            with pytest.raises(NotImplementedError, match=r"past_key_values: qwen3_5.* one prompt"):
                model(**again, past_key_values=cache, logits_to_keep=1)


def test_layers_that_nobody_looked_at_are_refused():
    model = tiny_llava()
    kinds = ["linear_attention"] + ["full_attention"] * 5
    model.config.text_config.layer_types = kinds
    with pytest.raises(NotImplementedError, match="layer 0 is a 'linear_attention', and has noth"):
        vtp.apply(model, vtp.FastV())
    model.config.text_config.layer_types = ["conv"] * 6
    with pytest.raises(NotImplementedError, match=r"'llama' .* no layer of full attention"):
        vtp.apply(model, vtp.FastV())


@ONE_FAMILY
def test_nothing_learns_from_masks(model):
    with pytest.raises(NotImplementedError, match=r"model: qwen3_5.* no mask can say"):
        MaskedRun(parts_of(model), (1,), None)


@pytest.mark.parametrize("family", ["lfm2_vl"], indirect=True)
def test_drafts_leave_convolutions_again(model, one):
    with vtp.prune(model, PYRAMID):
        expected = model.generate(**one, **SETTINGS)
        assert_same(model.generate(**one, **SETTINGS, prompt_lookup_num_tokens=3), expected)


@ONE_FAMILY
def test_drafts_are_refused_as_they_are_without_a_method(model, one):
    with vtp.prune(model, PYRAMID), pytest.raises(ValueError, match="stateful"):
        model.generate(**one, prompt_lookup_num_tokens=3)
