"""Caches that do not hold what a layer attends to: quantized, and offloaded."""

import contextlib
import copy

import pytest
import torch
from by_hand import gathered
from masked_reference import MaskedReference
from pruning_methods import pruning_method
from tiny_llava import DEPTH, batch, one, prompt, three, tiny_llava
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer

import vtp_kernels as vtp
from vtp_kernels.models.attention.stand_ins import ScoringAttention
from vtp_kernels.models.keys.cache import check_cache

GREEDY = {"max_new_tokens": 6, "do_sample": False}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
STAGES = {2: 0.5, 4: 0.25}
METHOD = vtp.PyramidDrop(tuple(STAGES), tuple(STAGES.values()))


class RowsOfFiveBits(QuantizedLayer):
    """Every row by itself, so that it does not matter which others there are."""

    def __init__(self):
        super().__init__(residual_length=4)  # of six new tokens, some get rounded on the way

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 15
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def rounding():
    cache = DynamicCache()
    cache.layer_class_to_replicate = RowsOfFiveBits
    return cache


@pytest.fixture(scope="module")
def model():
    return tiny_llava("sdpa")


@pytest.fixture(scope="module")
def eager():
    return tiny_llava("eager")


def assert_same(some, others, atol=1e-4):
    for a, b in zip(some.logits, others.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    assert torch.equal(some.sequences, others.sequences)


# ---- quantized --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["last_token", "contribution"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_quantized_cache_is_as_with_a_mask(model, eager, score, settings):
    inputs, method = three(), vtp.Schedule(STAGES, score=score)
    with vtp.prune(model, method) as run:
        got = model.generate(**inputs, **GREEDY, **DETAILS, **settings, past_key_values=rounding())
        kept = run.report().kept
        exact = model.generate(**inputs, **GREEDY, **DETAILS, **settings)
    with MaskedReference(eager, STAGES, score=score) as masked:
        expected = eager.generate(
            **inputs, **GREEDY, **DETAILS, **settings, past_key_values=rounding()
        )
    assert all(torch.equal(kept[layer], masked.kept[layer]) for layer in STAGES)
    assert_same(got, expected)
    assert not torch.allclose(got.logits[-1], exact.logits[-1], atol=1e-3)
    assert not got.past_key_values.vtp.attended


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_second_picture_is_scored_by_rounded_keys(model, eager, positions):
    """Those of the past are, those of the new prompt are not yet; both rows leave by."""
    first = batch(*(prompt(1, n, seed=n) for n in (3, 8)))
    more = [prompt(1, 2, seed=7), prompt(2, 6, seed=8)]
    width = max(map(len, more))
    ids, real = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, tokens in enumerate(more):
        ids[row, width - len(tokens) :] = tokens
        real[row, width - len(tokens) :] = 1
    pictures = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))

    def turns(of, cache):
        outputs = [of.generate(**first, **GREEDY, **DETAILS, past_key_values=cache)]
        said = outputs[0].sequences
        answered = said.shape[1] - first["attention_mask"].shape[1]
        mask = torch.cat((first["attention_mask"], torch.ones(2, answered).long(), real), dim=1)
        outputs.append(
            of.generate(
                input_ids=torch.cat((said, ids), dim=1),
                attention_mask=mask,
                pixel_values=pictures,
                past_key_values=outputs[0].past_key_values,
                **GREEDY,
                **DETAILS,
            )
        )
        return outputs

    with vtp.prune(model, METHOD, positions=positions) as run:
        got = turns(model, rounding())
        kept = run.report().kept
    with MaskedReference(eager, STAGES, contiguous=positions == "contiguous") as masked:
        expected = turns(eager, rounding())
    assert all(torch.equal(kept[layer], masked.kept[layer]) for layer in STAGES)
    for some, others in zip(got, expected, strict=True):
        assert_same(some, others)


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no such cache"
)
@pytest.mark.parametrize("name", ["fastv", "schedule", "inflection with padding"])
def test_transformers_own_quantized_cache(model, name, tmp_path):
    """Of 8 bits, with a scale that all rows share: as if those that leave had never been there."""
    inputs, method = one(), pruning_method(name, model, tmp_path)
    ids = inputs["input_ids"]
    with vtp.prune(model, method) as run:
        got = model.generate(
            **inputs, **GREEDY, **DETAILS, past_key_values=QuantizedCache("fp8", model.config)
        )
        kept = run.report().kept
        report = run.report()
    tokens = got.sequences[0, ids.shape[1] : -1].tolist()
    cache = QuantizedCache("fp8", model.config)
    expected = gathered(model, inputs, kept, cache, tokens)
    for a, b in zip(got.logits, expected, strict=True):
        torch.testing.assert_close(a, b[:, 0], rtol=0, atol=1e-4)
    exact = gathered(model, inputs, kept, DynamicCache(), tokens)
    assert not torch.allclose(got.logits[-1], exact[-1][:, 0], atol=1e-3)
    held = [layer.get_seq_length() for layer in got.past_key_values.layers]
    prompt_keys = [counts[0] for counts in report.kv_tokens_per_layer]
    assert held == [n + len(tokens) for n in prompt_keys]


@pytest.mark.parametrize("name", ["visipruner", "visipruner that skips"])
def test_passive_tokens_and_a_quantized_cache(model, name, tmp_path):
    """While it is read, a prompt attends to keys that are not rounded yet: the same prefill."""
    method = pruning_method(name, model, tmp_path)
    with vtp.prune(model, method), torch.no_grad():
        expected = model(**three())
        got = model(**three(), past_key_values=rounding())
    assert torch.equal(got.logits, expected.logits)
    layers = zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True)
    for some, others in layers:
        assert some.get_seq_length() == others.get_seq_length()
        for name in ("keys", "values"):
            rows, exact = (
                some._dequantize(getattr(some, f"_quantized_{name}")),
                getattr(others, name),
            )
            torch.testing.assert_close(rows, some._dequantize(some._quantize(exact, 0)))


def test_what_a_quantized_cache_cannot_do(model):
    with vtp.prune(model, METHOD), torch.no_grad():
        cache = model(**one(), past_key_values=rounding()).past_key_values
        for change in (
            lambda: cache.crop(-1),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with pytest.raises(NotImplementedError, match="quantized cache alone"):
                change()
    forgetful = vtp.VisiPruner(shallow_layers=2, drop_shallow_kv=True)
    with vtp.prune(model, forgetful), torch.no_grad():
        with pytest.raises(
            NotImplementedError, match=r"QuantizedCache holds rows in groups.*forget"
        ):
            model(**one(), past_key_values=rounding())


def test_scores_of_a_module_of_one_s_own_do_not_come_from_a_quantized_cache(model):
    """Where nobody keeps what was attended to, the cache's keys are the last few of all."""
    text = model.model.language_model
    hidden = torch.randn(1, 5, 64)
    embeddings = text.rotary_emb(hidden, position_ids=torch.arange(5)[None])
    scoring, candidates = ScoringAttention(text.layers[0].self_attn), torch.ones(1, 5).bool()
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="has quantized, moved or let go"):
            scoring(hidden, embeddings, None, rounding(), candidates=candidates)
        _, scores = scoring(hidden, embeddings, None, DynamicCache(), candidates=candidates)
    assert scores.shape == (1, 5)


# ---- offloaded --------------------------------------------------------------------------------


class Stream(contextlib.nullcontext):
    """Does what it is told at once."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a GPU: a layer's keys are away but when it runs, and cannot be computed with there. The
    meta device takes the part of the CPU's memory; what is put there is remembered."""
    away = {}

    def offload(layer):
        if layer.is_initialized and not layer.keys.is_meta:
            away[id(layer)] = layer.keys, layer.values
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")

    def prefetch(layer):
        if layer.is_initialized and layer.keys.is_meta:
            layer.keys, layer.values = away[id(layer)]

    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())


OFFLOADED = {
    "dynamic": lambda config: DynamicCache(config=config, offloading=True),
    "static": lambda config: StaticCache(config=config, max_cache_len=128, offloading=True),
}
HERE = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=128),
}


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("name", ["pyramiddrop", "schedule", "visipruner", "inflection"])
def test_offloaded_caches(model, elsewhere, kind, name, tmp_path):
    method = pruning_method(name, model, tmp_path)
    with vtp.prune(model, method) as run:
        expected = model.generate(
            **three(), **GREEDY, **DETAILS, past_key_values=HERE[kind](model.config)
        )
        kept = run.report().kept
        got = model.generate(
            **three(), **GREEDY, **DETAILS, past_key_values=OFFLOADED[kind](model.config)
        )
    away = [layer.keys.is_meta for layer in got.past_key_values.layers]
    assert sum(away) >= DEPTH - 1  # one is fetched ahead
    assert all(torch.equal(mask, run.report().kept[layer]) for layer, mask in kept.items())
    assert_same(got, expected, atol=2e-5)


def test_an_offloaded_cache_with_sliding_windows(elsewhere):
    model = tiny_llava(text="mistral", sliding_window=8)
    cache = DynamicCache(config=model.config, offloading=True, offload_only_non_sliding=False)
    with vtp.prune(model, METHOD):
        expected = model.generate(**three(), **GREEDY, **DETAILS)
        got = model.generate(**three(), **GREEDY, **DETAILS, past_key_values=cache)
    assert sum(layer.keys.is_meta for layer in got.past_key_values.layers) >= DEPTH - 1
    assert_same(got, expected, atol=2e-5)


def test_an_offloaded_cache_forgets_nothing(model, elsewhere):
    with vtp.prune(model, vtp.VisiPruner(shallow_layers=2, drop_shallow_kv=True)):
        with pytest.raises(NotImplementedError, match=r"offloaded cache has moved .*forget"):
            model.generate(**one(), **GREEDY, past_key_values=OFFLOADED["dynamic"](model.config))


# ---- others -----------------------------------------------------------------------------------


def test_caches_that_are_refused_say_why(model):
    window = DynamicCache(config=model.config)
    window.layers[3] = DynamicSlidingWindowLayer(8)

    class OddLayer(DynamicLayer):
        pass

    odd = DynamicCache(config=model.config)
    odd.layers[2] = OddLayer()
    later = DynamicCache()  # makes its layers as they are asked for
    later.layer_class_to_replicate = OddLayer
    for cache, why in (
        (later, r"DynamicCache with layers of OddLayer"),
        (window, r"DynamicCache with layers of DynamicSlidingWindowLayer .*other windows"),
        (odd, r"DynamicCache with layers of OddLayer .*keep all rows, in order"),
        (((torch.zeros(1),),), r"tuple is not supported: only caches"),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"past_key_values: {why}.*use a DynamicCache"
        ):
            check_cache(cache)
    with vtp.prune(model, METHOD), pytest.raises(NotImplementedError, match="other windows"):
        model.generate(**one(), **GREEDY, past_key_values=window)


def test_copies_of_quantized_caches_go_on_alike(model):
    token = {"input_ids": torch.tensor([[5]])}
    with vtp.prune(model, METHOD), torch.no_grad():
        cache = model(**one(), past_key_values=rounding()).past_key_values
        other = copy.deepcopy(cache)
        steps = [
            [model(**token, past_key_values=c).logits for _ in range(5)] for c in (cache, other)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
