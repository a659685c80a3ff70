"""LLaVA around other text models: those that pass the check are as if masked, no other is taken."""

import copy

import pytest
import torch
from masked_reference import MaskedReference
from test_every_family import passive_weights
from test_generation import DETAILS, assert_same, next_turn
from test_last_layer import Around
from tiny_llava import IMAGE, prompt, three, tiny_llava
from tiny_models import FAMILIES, TinyFamily
from transformers import AutoConfig, AutoModel, InternVLForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.models.attention.policy_attention import PolicyAttention
from vtp_kernels.models.attention.stand_ins import PassiveVisualAttention, ScoringAttention
from vtp_kernels.models.checks import text_check
from vtp_kernels.models.checks.text_check import check_text_model
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.families.tiny import EXPERTS as FEW_EXPERTS
from vtp_kernels.models.families.tiny import TEXT, Tiny, square
from vtp_kernels.models.masked_run import check_masks

GREEDY = {"max_new_tokens": 3, "do_sample": False}
EXPERTS = FEW_EXPERTS | {"num_local_experts": 4, "shared_expert_intermediate_size": 64}
# Pictures are 16 tokens of some 30: most rows are beyond the first block of 8.
SCALED_BY_POSITION = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.7,
    "original_max_position_embeddings": 8,
}
TAKEN = {
    "apertus": {},
    "cohere": {"use_qk_norm": True},
    "ernie4_5": {},
    "gemma": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2},
    "ministral3": {"head_dim": 16, "rope_parameters": SCALED_BY_POSITION},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "starcoder2": {},
}
PYRAMID, STAGES = vtp.PyramidDrop((2, 4), (0.5, 0.25)), {2: 0.5, 4: 0.25}


@pytest.fixture(scope="module", params=TAKEN)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models(kind):
    return {x: tiny_llava(x, text=kind, **TAKEN[kind]) for x in ("sdpa", "eager")}


def test_pruned_is_as_masked(models):
    """In a batch that comes without the padding between its prompts once rows have left, and whose
    last layer runs on the rows asked for alone; then in steps of decoding."""
    inputs = three()
    with vtp.prune(models["sdpa"], PYRAMID) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(models["eager"], STAGES) as masked:
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    assert all(torch.equal(kept[layer], masked.kept[layer]) for layer in STAGES)
    assert_same(pruned, reference, tolerance=5e-5)


def test_values_count(models):
    """Before layer 0 and by the contribution of values, in a call without generate()."""
    inputs = three()
    for method in (vtp.RandomPruning(0, 0.25), vtp.Schedule({2: 5}, score="contribution")):
        with vtp.prune(models["sdpa"], method) as run, torch.no_grad():
            pruned = models["sdpa"](**inputs, logits_to_keep=1).logits
        kept = run.report().kept
        score, given = "contribution", None
        if 0 in kept:
            score, given = "last_token", kept
        stages = {2: 5} if given is None else dict.fromkeys(kept)
        reference = MaskedReference(models["eager"], stages, score=score, given=given)
        with reference as masked, torch.no_grad():
            expected = models["eager"](**inputs, logits_to_keep=1).logits
        assert all(torch.equal(kept[layer], masked.kept[layer]) for layer in stages)
        torch.testing.assert_close(pruned, expected, rtol=0, atol=5e-5)


@torch.no_grad()
def test_passive_attention(models):
    """Of the weights of the eager attention, what is left where visual keys are passive."""
    inputs, model, seen = three(), models["eager"], {}
    attention = model.model.language_model.layers[0].self_attn

    def look(module, args, kwargs, output):
        seen.update(hidden=kwargs["hidden_states"], output=output)

    hook = attention.register_forward_hook(look, with_kwargs=True)
    model(**inputs)
    weights = seen["output"][1]
    with vtp.prune(model, vtp.VisiPruner(("shallow",), shallow_layers=1)):
        model(**inputs)
    hook.remove()
    hidden, real = seen["hidden"], inputs["attention_mask"].bool()
    value = attention.v_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    visual = inputs["input_ids"] == IMAGE
    weights = [passive_weights(*prompt, "exact") for prompt in zip(weights, visual, strict=True)]
    expected = torch.stack(weights) @ value
    expected = attention.o_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"][0][real], expected[real], rtol=0, atol=5e-5)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_positions_scale_queries(positions):
    """Ministral 3: while rows leave, in steps of decoding, and in a further turn."""
    settings = TAKEN["ministral3"]
    models = {x: tiny_llava(x, text="ministral3", **settings) for x in ("sdpa", "eager")}
    inputs = three()

    def talk(model):
        first = model.generate(**inputs, **GREEDY, **DETAILS)
        again = {"input_ids": torch.cat((first.sequences, first.sequences[:, -3:]), 1)}
        ones = torch.ones(len(first.sequences), GREEDY["max_new_tokens"] + 3, dtype=torch.long)
        again["attention_mask"] = torch.cat((inputs["attention_mask"], ones), 1)
        cache = first.past_key_values
        return model.generate(**again, past_key_values=cache, **GREEDY, **DETAILS)

    with vtp.prune(models["sdpa"], PYRAMID, positions=positions):
        pruned = talk(models["sdpa"])
    contiguous = positions == "contiguous"
    with MaskedReference(models["eager"], STAGES, contiguous=contiguous):
        assert_same(pruned, talk(models["eager"]), tolerance=5e-5)


@torch.no_grad()
def test_positions_scale_queries_of_rows_that_skip_attention():
    """One visual token takes part in layer 0: the same as among rows at these positions alone."""
    model = tiny_llava(text="ministral3", **TAKEN["ministral3"])
    inputs, seen = three(), []
    attention = model.model.language_model.layers[0].self_attn

    def look(module, args, kwargs, output):
        seen.append((kwargs, output[0]))

    hook = attention.register_forward_hook(look, with_kwargs=True)
    method = vtp.VisiPruner(("shallow",), shallow_layers=1, shallow_attention="skip")
    with vtp.prune(model, method):
        model(**inputs)
    hook.remove()
    (given, output), *_ = seen
    assert not seen[1:]
    for b, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][b].bool()
        visual = ids == IMAGE
        rows = (real & (~visual | (visual.cumsum(0) == 1))).nonzero()[:, 0]
        positions = rows[None]  # a plain call counts padding
        some = given["hidden_states"][b : b + 1, rows]
        embeddings = model.model.language_model.rotary_emb(some, position_ids=positions)
        expected, _ = attention(
            hidden_states=some,
            position_embeddings=embeddings,
            attention_mask=None,
            position_ids=positions,
        )
        text = ~visual[rows]
        torch.testing.assert_close(output[b, rows[text]], expected[0, text], rtol=0, atol=2e-5)


def test_flash_attention_is_told_no_positions_with_gaps(monkeypatch):
    model = tiny_llava(text="ministral3", **TAKEN["ministral3"])
    with vtp.prune(model, PYRAMID), torch.no_grad():
        monkeypatch.setattr(
            model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2"
        )
        with pytest.raises(NotImplementedError, match=r"FlashAttention .* Ministral3Attention"):
            model(**three())


def test_those_that_are_named():
    named = vtp.supported_models()["llava"]["text_models"]
    elsewhere = {"llama", "mistral", "qwen2", "qwen3", "qwen3_next"}  # by the families' pages
    assert {*TAKEN, *elsewhere} == set(named)


# --- attention with sinks -------------------------------------------------------------------------

WITH_SINKS = {
    "windows": {"sliding_window": 8},  # in layers 0, 2 and 4
    "no windows": {"layer_types": ["full_attention"] * 6},
}


@pytest.fixture(scope="module", params=WITH_SINKS)
def with_sinks(request):
    """InternVL around gpt-oss, which runs without SDPA; and prompts for it."""

    def make():
        config = FAMILIES["internvl"].make().config
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        settings = TEXT | EXPERTS | WITH_SINKS[request.param] | {"head_dim": 16}
        config.text_config = AutoConfig.for_model("gpt_oss", **settings, rope_parameters=rope)
        return InternVLForConditionalGeneration(config)

    family = TinyFamily(FAMILIES["internvl"].page, Tiny(make, square(112)))
    model = family.model("eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.get_decoder().layers:  # far from even, and some larger than any logit
            layer.self_attn.sinks.normal_(1, 2, generator=generator)
    return model, family.batch(model, ((0,), 9), ((1, 2), 3), ((), 5))


@pytest.mark.parametrize(
    "method",
    [
        vtp.RandomPruning(0, 0.25),
        vtp.Schedule({1: 0.5, 3: 0.25, 5: 0.0}, score="random"),
        vtp.DivPrune(0.3),
        vtp.VisPruner(keep=6),
    ],
    ids=lambda method: method.name,
)
def test_rows_leave_layers_with_sinks(with_sinks, method):
    """As they are let go without a look at what layers attend to, also in a second turn."""
    model, inputs = with_sinks
    settings = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}
    turns = [prompt(0, n, seed=n) for n in (2, 5, 0)]

    def talk():
        first = model.generate(**inputs, **settings)
        more = next_turn(first.sequences, inputs["attention_mask"], turns)
        return first, model.generate(**more, past_key_values=first.past_key_values, **settings)

    with vtp.prune(model, method) as run:
        first = model.generate(**inputs, **settings)
        kept = run.report().kept
        pruned = talk()
    assert not kept[max(kept)].all()
    with MaskedReference(model, dict.fromkeys(kept), given=kept):
        for now, expected in zip((first, *pruned), (*talk()[:1], *talk()), strict=True):
            assert_same(now, expected, tolerance=5e-5)


@torch.no_grad()
def test_methods_that_look_at_attention_with_sinks_are_refused(with_sinks):
    model, _ = with_sinks
    message = r"internvl cannot run .*: the softmax of layer \d has attention sinks, and a row's"
    for method in (
        vtp.FastV(2),
        vtp.DART(2, keep=4),
        vtp.Schedule({2: 5}, score="contribution"),
        vtp.VisiPruner(("shallow",), shallow_layers=1),
        vtp.VisiPruner(("shallow",), shallow_layers=1, shallow_attention="skip"),
    ):
        with pytest.raises(NotImplementedError, match=f"{message}|sees a sliding window"):
            vtp.apply(model, method)
    attention = model.get_decoder().layers[1].self_attn
    passive = PassiveVisual("drop", "causal")
    for stand_in in (
        lambda: PassiveVisualAttention(attention, passive),
        lambda: ScoringAttention(attention),
        lambda: PolicyAttention(attention),
    ):
        with pytest.raises(NotImplementedError, match="layer 1 has attention sinks"):
            stand_in()
    with pytest.raises(NotImplementedError, match=r"cannot learn a choice .* has attention s"):
        check_masks(parts_of(model))


def test_other_attention_sinks_are_told_from_those():
    def change(forward):
        def other(self, *args, **kwargs):
            sinks, self._parameters["sinks"] = self.sinks, torch.nn.Parameter(self.sinks * 2)
            output = forward(self, *args, **kwargs)
            self._parameters["sinks"] = sinks
            return output

        return other

    settings = EXPERTS | FULL | {"head_dim": 16}
    for does, message in ((lambda forward: forward, None), (change, "layer 2 uses s_aux")):
        text = text_model("gpt_oss", **settings)
        attention = text.layers[2].self_attn
        kind = type(attention)
        made = type(kind.__name__, (kind,), {"forward": does(kind.forward)})
        made.__module__ = kind.__module__
        attention.__class__ = made
        if message is None:
            check_text_model(text)
            continue
        with pytest.raises(NotImplementedError, match=message):
            check_text_model(text)


# --- what is refused ------------------------------------------------------------------------------

LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 8,
}
FULL = {"layer_types": ["full_attention"] * 6}
REFUSED = {
    "bitnet": ({}, r"does more than o_proj .* by 0\.\d+ of its size \(it has attn_sub_norm\)"),
    "deepseek_v3": (EXPERTS | LATENT, "class DeepseekV3Attention with no k_proj"),
    "diffllama": ({}, "layer 0 attends to other keys than it puts into the KV cache"),
    "doge": ({}, "layer 0 has attention functions of its own"),
    "gemma2": (FULL | {"head_dim": 16}, "layer 0 uses softcap"),
    "hunyuan_v1_dense": (
        {"head_dim": 16},
        r"the queries of layer 0 as recomputed differ .* by [\d.]+ of their size \(it has query_la",
    ),
    "llama4_text": (EXPERTS | {"head_dim": 16}, "it has layers of chunked_attention"),
    "nemotron": ({}, "layer 0 does not hand on to its attention what it is given besides"),
    "olmo2": ({}, "q_norm of layer 0 is not for heads of 16 numbers"),
    "phi": ({}, "it has no norm"),
    "phi3": ({}, "class Phi3Attention with no q_proj"),
    "smollm3": ({}, "the queries of layer 3 .*, for it does not rotate them"),
    "stablelm": ({}, "layer 0 does not hand on to its attention what it is given besides"),
}


def text_model(kind, **settings):
    """Without weights: none are looked at."""
    settings = TEXT | settings
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_what_differs(kind):
    settings, message = REFUSED[kind]
    with pytest.raises(NotImplementedError, match=f"a '{kind}' text model is not .*: .*{message}"):
        check_text_model(text_model(kind, **settings))


def test_refused_in_a_model():
    model = tiny_llava(text="smollm3")
    for method in (PYRAMID, vtp.RandomPruning(2)):
        with pytest.raises(NotImplementedError, match="a 'smollm3' text model is not supported"):
            vtp.apply(model, method)
    assert vtp.handle(model) is None
    vtp.apply(tiny_llava(text="smollm3", no_rope_layers=[1] * 6), PYRAMID).remove()


# --- one thing that differs -----------------------------------------------------------------------


def changed(name, change, kind="llama"):
    """A text model with another forward, `change(forward)`, in layer 2 or its attention."""
    model = text_model(kind, **({} if kind == "llama" else TAKEN[kind]))
    module = model.layers[2] if name == "layer" else model.layers[2].self_attn
    before = type(module)
    made = type(before.__name__, (before,), {"forward": change(before.forward)})
    made.__module__ = before.__module__
    module.__class__ = made
    return model


def with_keyword(name, make):
    """Changes an argument of a forward."""

    def change(forward):
        def other(self, *args, **kwargs):
            return forward(self, *args, **kwargs | {name: make(kwargs[name])})

        return other

    return change


def less(forward):
    def other(self, *args, **kwargs):
        output, weights = forward(self, *args, **kwargs)
        return 0.99 * output, weights

    return other


def scaled(forward):
    def other(self, *args, **kwargs):
        before, self.scaling = self.scaling, 0.3
        output = forward(self, *args, **kwargs)
        self.scaling = before
        return output

    return other


def negated(forward):
    def other(self, hidden_states, **kwargs):
        return forward(self, -hidden_states, **kwargs)

    return other


def takes_more(forward):
    def other(self, hidden_states, per_layer_input=None, **kwargs):
        return forward(self, hidden_states, **kwargs)

    return other


turned = with_keyword("position_embeddings", lambda pair: pair[::-1])
open_to_all = with_keyword("attention_mask", lambda mask: mask * 0)
ONE_THING = {
    "what attention puts out": ("attention", less, "layer 2 does more than o_proj .* by 0.0"),
    "the scale": ("attention", scaled, r"layer 2 attends with a scale of 0\.3, and its .* 0\.25"),
    "the rotation": ("attention", turned, "the queries of layer 2 as recomputed differ"),
    "rows": ("layer", negated, "layer 2 attends to something else than rows behind its input_la"),
    "the mask": ("layer", open_to_all, "layer 2 does not hand its attention_mask"),
    "another input": ("layer", takes_more, "layer 2 takes per_layer_input besides its rows"),
}


@pytest.mark.parametrize("name", ONE_THING)
def test_one_thing_that_differs(name):
    where, change, message = ONE_THING[name]
    check_text_model(changed(where, lambda forward: forward))
    with pytest.raises(NotImplementedError, match=message):
        check_text_model(changed(where, change))


def test_another_scale_by_position():
    later = with_keyword("position_ids", lambda positions: positions + 8)
    check_text_model(changed("attention", lambda forward: forward, "ministral3"))
    with pytest.raises(NotImplementedError, match="the queries of layer 2 as recomputed differ"):
        check_text_model(changed("attention", later, "ministral3"))


def test_a_mask_that_is_not_causal():
    with pytest.raises(NotImplementedError, match="the mask of layer 0 is not causal"):
        check_text_model(text_model("llama", is_causal=False))
    text = text_model("llama")
    text.layers[2].self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match="the attention of layer 2 is not causal"):
        check_text_model(text)


# --- nothing else is touched ----------------------------------------------------------------------


def test_nothing_is_called_or_changed():
    """Not the modules, whose weights may be anywhere, nor what others have put on them."""
    text = AutoModel.from_config(AutoConfig.for_model("qwen3", **TEXT))

    def never(*args):
        raise AssertionError

    for module in text.modules():
        module.register_forward_pre_hook(never)
        module.forward = never
    state, config = torch.get_rng_state(), copy.deepcopy(text.config)
    before = {name: dict(vars(module)) for name, module in text.named_modules()}
    with torch.autocast("cpu", torch.bfloat16):
        check_text_model(text)
    assert torch.equal(torch.get_rng_state(), state)
    assert text.config.to_dict() == config.to_dict()
    assert text.config._attn_implementation == config._attn_implementation
    assert {name: dict(vars(module)) for name, module in text.named_modules()} == before


def test_checked_once(monkeypatch):
    text, runs = text_model("llama"), []
    run = text_check._Trial.run
    monkeypatch.setattr(text_check._Trial, "run", lambda trial: runs.append(run(trial)))
    for _ in range(2):
        check_text_model(text)
    assert len(runs) == 1
    text.layers[5].self_attn.scaling = 0.5  # as good
    check_text_model(text)
    assert len(runs) == 2
    text.layers[3].self_attn.head_dim = 8
    with pytest.raises(NotImplementedError, match="a few rows layer 3 fails"):
        check_text_model(text)


def test_an_attention_put_in_its_place_is_left_alone():
    """By an adapter, say: nothing is known of what it computes."""
    model = tiny_llava()
    layer = model.model.language_model.layers[3]
    layer.self_attn = Around(layer.self_attn)
    vtp.apply(model, vtp.FastV(2)).remove()
    with pytest.raises(NotImplementedError, match="layer 3 attended to, and somebody put a Around"):
        vtp.apply(model, vtp.FastV(4))
