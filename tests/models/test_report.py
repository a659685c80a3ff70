"""The report against counts made by hand."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava
from transformers import LlamaConfig

import vtp_kernels as vtp
from vtp_kernels.flop_counts.text import TEXT
from vtp_kernels.models import Report

GREEDY = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_llava("sdpa")


@pytest.fixture(scope="module")
def report(model):
    with vtp.prune(model, vtp.PyramidDrop((2, 4), (0.5, 3))) as run:
        model.generate(**three(), **GREEDY)
        return run.report()


def test_fields_are_those_of_the_contract():
    assert list(Report.__dataclass_fields__) == [
        "method",
        "dense_tokens",
        "tokens_per_layer",
        "visual_tokens_per_layer",
        "kv_tokens_per_layer",
        "kept",
        "prefill_flops",
        "dense_prefill_flops",
        "flops_reduction",
        "flops_unknown",
        "visual_attention_reduction",
        "kv_bytes",
        "dense_kv_bytes",
        "events",
        "units",
        "flops_per_layer",
        "dense_flops_per_layer",
        "scores",
        "compiled",
    ]


def test_tokens(report):
    # <bos>, 3 words, then 16 tokens and 2 words per image, then 9, 3, 6 and 5 words
    assert report.dense_tokens == [31, 43, 64, 9]
    assert (
        report.visual_tokens_per_layer
        == [[16, 32, 48, 0]] * 2 + [[8, 16, 24, 0]] * 2 + [[3, 3, 3, 0]] * 2
    )
    assert (
        report.tokens_per_layer
        == [[31, 43, 64, 9]] * 2 + [[23, 27, 40, 9]] * 2 + [[18, 14, 19, 9]] * 2
    )
    assert report.kv_tokens_per_layer == report.tokens_per_layer
    assert report.method == vtp.PyramidDrop((2, 4), (0.5, 3)).to_dict()


def test_kept(report):
    inputs = three()
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    assert list(report.kept) == [2, 4]
    for layer, kept in report.kept.items():
        assert kept.shape == visual.shape and kept.dtype == torch.bool
        assert not (kept & ~real).any()
        assert torch.equal(kept & ~visual, real & ~visual)
        assert (kept & visual).sum(1).tolist() == report.visual_tokens_per_layer[layer]
    assert not (report.kept[4] & ~report.kept[2]).any()


def test_flops(report, model):
    prompts = [list(layers) for layers in zip(*report.tokens_per_layer, strict=True)]
    assert report.prefill_flops == sum(vtp.flops(model, tokens) for tokens in prompts)
    assert report.dense_prefill_flops == sum(vtp.flops(model, n) for n in (31, 43, 64, 9))
    assert report.flops_reduction == 1 - report.prefill_flops / report.dense_prefill_flops


def test_flops_per_layer_add_up(report):
    assert sum(report.flops_per_layer) == report.prefill_flops
    assert sum(report.dense_flops_per_layer) == report.dense_prefill_flops
    assert report.flops_per_layer[:2] == report.dense_flops_per_layer[:2]


@pytest.mark.parametrize(
    "method", ["fastv:2:0.5", "fastv:2:0.5:picture", "random:4", "schedule:2=0.5,4=3:text"]
)
def test_scores_are_what_columns_stayed_by(model, method):
    with vtp.prune(model, method) as run, torch.no_grad():
        model(**three())
        report = run.report()
    there = report.kept.visual
    assert report.scores.keys() == report.kept.keys()
    for layer, scores in report.scores.items():
        assert (scores.isnan() == ~there).all()
        kept, gone = report.kept[layer] & there, there & ~report.kept[layer]
        for unit in report.units if method.endswith("picture") else range(len(there)):
            of = torch.zeros_like(there)
            if isinstance(unit, dict):
                prompt = [x for x in report.units if x["prompt"] == unit["prompt"]]
                first = sum(x["tokens"] for x in prompt[: unit["picture"]])
                columns = there[unit["prompt"]].nonzero()[:, 0]
                of[unit["prompt"], columns[first : first + unit["tokens"]]] = True
            else:
                of[unit] = True
            if (kept & of).any() and (gone & of).any():
                assert scores[kept & of].min() >= scores[gone & of].max()
        there = kept


def test_visual_attention(model):
    with vtp.prune(model, vtp.FastV(3, 4)) as run:
        model.generate(**one(), **GREEDY)

    def visual_pairs(visual, text):
        tokens = [True] * visual + [False] * text
        return sum(tokens[q] or tokens[k] for q in range(len(tokens)) for k in range(q + 1))

    dense = 6 * visual_pairs(16, 13)
    pruned = 3 * visual_pairs(16, 13) + 3 * visual_pairs(4, 13)
    assert run.report().visual_attention_reduction == pytest.approx(1 - pruned / dense)


def test_visual_attention_where_layers_are_linear(model):
    """They have no weights that could go."""
    with vtp.prune(model, vtp.FastV(3, 4)) as run, torch.no_grad():
        model(**one())
    kinds = {"layer_types": ["linear_attention"] * 3 + ["full_attention"] * 3}
    config = LlamaConfig(**model.config.text_config.to_dict() | kinds)
    report = replace(run._last, config=config, linear=frozenset(range(3))).report()
    visual, text = [n[0] for n in report.visual_tokens_per_layer[2:4]], 13
    dense, pruned = (n * text + n * (n + 1) // 2 for n in visual)
    assert report.visual_attention_reduction == pytest.approx(1 - pruned / dense)
    assert "its layer 0 is a 'linear_attention'" in report.flops_unknown  # in a Llama


def test_flops_that_are_not_known(model, monkeypatch):
    """The rest of the report is."""
    with vtp.prune(model, vtp.FastV(3, 4)) as run, torch.no_grad():
        model(**one())
    known = run.report()
    monkeypatch.delitem(TEXT, "llama")
    report = run.report()
    assert "FLOPs of a 'llama' language model are not known" in report.flops_unknown
    assert report.prefill_flops is report.dense_prefill_flops is report.flops_reduction is None
    assert report.visual_attention_reduction == known.visual_attention_reduction
    assert report.kv_bytes == known.kv_bytes and known.flops_unknown is None
    assert json.loads(json.dumps(report.to_dict()))["prefill_flops"] is None
    assert "prefill: FLOPs not known (FLOPs of a 'llama'" in str(report)


def test_kv_bytes(report):
    per_token = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 numbers, float32
    assert report.kv_bytes == per_token * 2 * sum(
        sum(counts) for counts in ([31, 43, 64, 9], [23, 27, 40, 9], [18, 14, 19, 9])
    )
    assert report.dense_kv_bytes == per_token * 6 * (31 + 43 + 64 + 9)


def test_kv_of_a_prompt_alone_is_what_the_cache_holds(model):
    with vtp.prune(model, vtp.RandomPruning(0, 5)) as run, torch.no_grad():
        cache = model(**one()).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert run.report().kv_bytes == held


def test_events(report):
    assert [(event["layer"], event["event"]) for event in report.events] == [
        (2, "pruned"),
        (4, "pruned"),
    ]
    assert report.events[1]["visual_before"] == [8, 16, 24, 0]
    assert report.events[1]["visual_after"] == [3, 3, 3, 0]


def test_to_dict_is_json(report):
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["dense_tokens"] == report.dense_tokens
    assert plain["kept"]["4"][0] == report.kept[4][0].nonzero()[:, 0].tolist()


def test_str(report):
    text = str(report)
    assert "pyramiddrop layers=[2, 4] keep=[0.5, 3]" in text
    assert "prompt 0: 31 tokens, 16 visual: 8 from layer 2, 3 from layer 4" in text
    assert "prompt 3: 9 tokens, 0 visual: all stay" in text
    assert "KV cache" in text and "FLOP" in text


def test_str_when_tokens_leave_before_layer_0(model):
    with vtp.prune(model, vtp.RandomPruning(0, 5)) as run:
        model.generate(**one(), **GREEDY)
    assert "prompt 0: 29 tokens, 16 visual: 5 from layer 0" in str(run.report())


def test_many_prompts_are_summed_up(model):
    with vtp.prune(model, vtp.FastV()) as run:
        model.generate(**batch(*(prompt(1, 3, seed) for seed in range(6))), **GREEDY)
    assert "... and 2 more prompts" in str(run.report())


def test_an_empty_schedule_reports_the_dense_model(model):
    inputs = one()
    dense = model.generate(**inputs, **GREEDY)
    with vtp.prune(model, vtp.Schedule({})) as run:
        assert torch.equal(model.generate(**inputs, **GREEDY), dense)
    report = run.report()
    assert report.kept == {} and report.events == []
    assert report.flops_reduction == report.visual_attention_reduction == 0.0
    assert report.kv_bytes == report.dense_kv_bytes


def test_the_last_prefill_with_images_counts(model):
    with vtp.prune(model, vtp.FastV()) as run:
        model.generate(**one(), **GREEDY)
        model.generate(**batch(prompt(0, 5, 0)), **GREEDY)
        assert run.report().dense_tokens == [29]
        model.generate(**batch(prompt(2, 5, 0)), **GREEDY)
        assert run.report().dense_tokens == [45]


def test_a_further_image_counts_the_keys_before_it(model):
    first = one()
    with vtp.prune(model, vtp.FastV(2, 4)) as run, torch.no_grad():
        cache = model(**first).past_key_values
        more = prompt(1, 3, 5)[None]
        mask = torch.ones(1, first["input_ids"].shape[1] + more.shape[1]).long()
        model(
            input_ids=more,
            attention_mask=mask,
            pixel_values=first["pixel_values"],
            past_key_values=cache,
        )
    report = run.report()
    assert report.dense_tokens == [25]
    assert report.kv_tokens_per_layer == [[29 + 25]] * 2 + [[17 + 13]] * 4
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert [[n] for n in lengths] == report.kv_tokens_per_layer
