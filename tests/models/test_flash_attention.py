"""FlashAttention, which has no masks: padding is cut out of the batch around it.

On a CPU loops stand in for its two kernels, and all that transformers does around them is its own:
finding the padding, cutting it out, taking positions with gaps for packed sequences. The kernels
themselves run where there are a GPU and flash-attn.
"""

import importlib.util
import sys
import types

import pytest
import torch
from masked_reference import MaskedReference
from pruning_methods import NAMES, ONLY_ROWS_LEAVE, pruning_method
from test_generation import DETAILS, GREEDY, METHOD, assert_same, leave_out_endings, next_turn
from tiny_llava import BATCHES, IMAGE, one, prompt, three, tiny_llava
from transformers import modeling_flash_attention_utils as flash_utils

import vtp_kernels as vtp

SETTINGS = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def flash_attn_func(query, key, value, causal=False, softmax_scale=None, dropout_p=0.0):
    """[B, S, H, D] each. The last query sees all keys, those before it one less each."""
    rows, keys = query.shape[1], key.shape[1]
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * softmax_scale
    if causal:
        seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        weights = weights.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1).nan_to_num(0.0), value)


def flash_attn_varlen_func(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal=False,
    softmax_scale=None,
    dropout_p=0.0,
):
    """[all rows, H, D] each, one sequence behind the other."""
    parts = []
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        assert rows.stop - rows.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
        sequence = (query[None, rows], key[None, keys], value[None, keys])
        parts.append(flash_attn_func(*sequence, causal, softmax_scale)[0])
    return torch.cat(parts)


@pytest.fixture
def loops(monkeypatch):
    """A flash-attn of loops in the place of the package."""
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = (
        flash_attn_func,
        flash_attn_varlen_func,
    )
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


@pytest.fixture
def flash(loops):
    model = tiny_llava("sdpa")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.fixture(scope="module")
def sdpa():
    return tiny_llava("sdpa")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("name", ("none", *NAMES))
def test_equals_sdpa(flash, sdpa, name, inputs, cache, tmp_path):
    inputs, outputs = BATCHES[inputs](), []
    for model, settings in ((flash, CACHES[cache]), (sdpa, {})):
        method = vtp.Schedule({}) if name == "none" else pruning_method(name, sdpa, tmp_path)
        with vtp.prune(model, method):
            outputs.append(model.generate(**inputs, **SETTINGS, **settings))
    assert_same(*outputs)


def test_a_window_that_holds_prompt_and_answer(loops):
    flash, sdpa = (tiny_llava("sdpa", text="mistral", sliding_window=80) for _ in range(2))
    flash.model.language_model.config._attn_implementation = "flash_attention_2"
    outputs = []
    for model in (flash, sdpa):
        with vtp.prune(model, METHOD):
            outputs.append(model.generate(**three(), **SETTINGS))
    assert_same(*outputs)
    with vtp.prune(flash, METHOD), pytest.raises(NotImplementedError, match="answer have 81 rows"):
        flash.generate(**three(), **SETTINGS | {"max_new_tokens": 81 - 64})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"use_cache": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_ways_to_generate(flash, sdpa, settings):
    inputs = one() if "prompt_lookup_num_tokens" in settings else three()
    outputs = []
    for model in (flash, sdpa):
        with vtp.prune(model, METHOD):
            outputs.append(model.generate(**inputs, **SETTINGS, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize("make", [one, three])
@pytest.mark.parametrize("rows", ["one row", "some rows"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_further_turn(flash, sdpa, positions, rows, make):
    """With padding in the middle of conversations, in layers of different lengths."""
    inputs, outputs = make(), []
    turns = [prompt(0, n, seed=n) for n in (2, 5, 0, 7)][: len(inputs["input_ids"])]
    if rows == "one row":
        turns = [tokens[:1] for tokens in turns]
    for model in (flash, sdpa):
        with vtp.prune(model, METHOD, positions=positions):
            first = model.generate(**inputs, **SETTINGS)
            more = next_turn(first.sequences, inputs["attention_mask"], turns)
            leave_out_endings(more["attention_mask"], inputs["input_ids"].shape[1])
            outputs.append(
                model.generate(**more, past_key_values=first.past_key_values, **SETTINGS)
            )
    assert_same(*outputs)


def why_not_flash():
    if not torch.cuda.is_available():
        return "needs a CUDA device: torch sees none"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None


@pytest.mark.gpu
@pytest.mark.skipif(why_not_flash() is not None, reason=str(why_not_flash()))
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("inputs", BATCHES)
@pytest.mark.parametrize("name", ONLY_ROWS_LEAVE)
def test_kernels_equal_the_masked_reference(name, inputs, cache, tmp_path):
    """In bfloat16, which is what they take."""
    flash, eager = (
        tiny_llava(kind, dtype=torch.bfloat16).cuda() for kind in ("flash_attention_2", "eager")
    )
    inputs = {
        k: v.cuda().to(torch.bfloat16) if v.is_floating_point() else v.cuda()
        for k, v in BATCHES[inputs]().items()
    }
    with vtp.prune(flash, pruning_method(name, flash, tmp_path)) as run:
        pruned = flash.generate(**inputs, **SETTINGS, **CACHES[cache])
    kept = {layer: mask.cuda() for layer, mask in run.report().kept.items()}
    with MaskedReference(eager, dict.fromkeys(kept), given=kept), torch.no_grad():
        expected = eager(**inputs).logits[:, -1]
    error = (pruned.logits[0] - expected).abs().max()
    assert error < 0.05 * expected.abs().max()
