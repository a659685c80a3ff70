"""Rows without the padding between them: nothing changes but how much is computed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pruning_methods import NAMES, pruning_method
from test_generation import DETAILS, GREEDY, METHOD, assert_same
from tiny_llava import IMAGE, batch, one, prompt, three, tiny_llava
from transformers import DynamicCache

import vtp_kernels as vtp
from vtp_kernels.models.attention.packing import Packing
from vtp_kernels.models.attention.stand_ins import PackedAttention

SETTINGS = GREEDY | DETAILS | {"suppress_tokens": [IMAGE]}


def test_there_and_back(draw):
    packing = Packing([2, 5, 0, 3], 5, torch.device("cpu"))
    rows = draw.normal(4, 5, 3, 2)
    packed = packing.pack(rows)
    assert packed.shape == (1, 10, 3, 2)
    assert torch.equal(packed[0], torch.cat((rows[0, 3:], rows[1], rows[3, 2:])))
    back = packing.unpack(packed)
    assert back.shape == rows.shape
    for b, count in enumerate((2, 5, 0, 3)):
        assert torch.equal(back[b, 5 - count :], rows[b, 5 - count :])
    assert torch.equal(packing.pack(back), packed)


def test_little_padding_stays():
    device = torch.device("cpu")
    assert Packing.of([10, 10], 10, device) is None
    assert Packing.of([10, 7], 10, device) is None
    assert Packing.of([10, 6], 10, device).batch == 2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("past", [0, 3])
def test_attention_is_that_of_the_batch(draw, attention, past):
    text = tiny_llava(attention).model.language_model
    module, counts, width = text.layers[1].self_attn, [4, 7, 2], 7
    caches = DynamicCache(), DynamicCache()
    if past:
        earlier = draw.normal(3, past, 64)
        places = torch.arange(past).expand(3, -1)
        for cache in caches:
            embeddings = text.rotary_emb(earlier, position_ids=places)
            module(earlier, embeddings, None, past_key_values=cache)
    hidden = draw.normal(3, width, 64)
    places = torch.arange(past, past + width).expand(3, -1)
    embeddings = text.rotary_emb(hidden, position_ids=places)
    real = torch.arange(width) >= width - torch.tensor(counts)[:, None]
    seen = torch.ones(width, past + width, dtype=torch.bool).tril(past)
    seen = seen & torch.nn.functional.pad(real, (past, 0), value=True)[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    expected, _ = module(hidden, embeddings, attention_mask=mask, past_key_values=caches[0])
    packing = Packing(counts, width, hidden.device)
    got, _ = PackedAttention(module)(
        packing.pack(hidden),
        embeddings,
        attention_mask=mask,
        past_key_values=caches[1],
        packing=packing,
    )
    torch.testing.assert_close(got[0], expected[real], rtol=0, atol=2e-6)
    for name in ("keys", "values"):
        held = (getattr(cache.layers[1], name)[:, :, past:] for cache in caches)
        torch.testing.assert_close(*(x.transpose(1, 2)[real] for x in held), rtol=0, atol=2e-6)


def rows_computed(model, inputs):
    """How many rows went through the MLP of every layer, in a prefill that asks for all logits."""
    rows, layers = [], model.model.language_model.layers
    activations = [layer.mlp.act_fn for layer in layers]
    for layer, activation in zip(layers, activations, strict=True):
        layer.mlp.act_fn = Counting(activation, rows)
    with torch.no_grad():
        model(**inputs)
    for layer, activation in zip(layers, activations, strict=True):
        layer.mlp.act_fn = activation
    return rows


class Counting(torch.nn.Module):
    """Not a hook: where others have hooks in a layer, its rows are not packed."""

    def __init__(self, activation, rows):
        super().__init__()
        self.activation, self.rows = activation, rows

    def forward(self, x):
        self.rows.append(x.shape[:-1].numel())
        return self.activation(x)


@pytest.mark.parametrize("name", NAMES)
def test_as_much_is_computed_as_stays(name, tmp_path, monkeypatch):
    """One prompt keeps three times what another does, and holds up nobody; with the padding between
    them it would say the same."""
    model, inputs = tiny_llava(), three()
    with vtp.prune(model, pruning_method(name, model, tmp_path)) as run:
        packed, rows = model.generate(**inputs, **SETTINGS), rows_computed(model, inputs)
        report = run.report()
        monkeypatch.setattr(Packing, "LEAST_PADDING", 1.0)
        padded, all_rows = model.generate(**inputs, **SETTINGS), rows_computed(model, inputs)
        assert str(run.report()) == str(report)
    assert_same(packed, padded)
    totals = report.tokens_per_layer
    if name == "inflection with padding":  # how many stay the host never asks
        assert rows == all_rows
        return
    assert all_rows == [4 * max(layer) for layer in totals]
    first = min(report.kept)
    assert rows[:first] == all_rows[:first]
    little = [sum(layer) > 0.8 * 4 * max(layer) for layer in totals]
    assert rows[first:] == [
        4 * max(layer) if stays else sum(layer)
        for layer, stays in zip(totals[first:], little[first:], strict=True)
    ]
    # There prompts keep alike, on this model.
    assert all(little[first:]) == (name == "visipruner that skips")


def test_what_others_see_of_layers_is_the_batch():
    model, inputs, shapes = tiny_llava(), three(), []
    layers = model.model.language_model.layers
    hook = layers[4].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    with vtp.prune(model, METHOD) as run, torch.no_grad():
        rows = rows_computed(model, inputs)
        states = model(**inputs, output_hidden_states=True).hidden_states
        widths = [max(layer) for layer in run.report().tokens_per_layer]
    hook.remove()
    assert rows[4] < 4 * widths[4]
    assert shapes == [(4, widths[4], 64)] * 2
    assert [state.shape[:2] for state in states[1:-1]] == [(4, width) for width in widths[:-1]]


def test_prompts_that_keep_alike_are_not_touched():
    model = tiny_llava()
    for inputs in (one(), batch(prompt(1, 7, 0), prompt(1, 7, 1))):
        with vtp.prune(model, METHOD):
            rows = rows_computed(model, inputs)
        assert rows == sorted(rows, reverse=True) and rows[0] == inputs["input_ids"].numel()


def test_an_attention_around_the_attention_is_not_taken_apart():
    """As peft puts one around a module that it trains as a whole."""
    model, plain = tiny_llava(), tiny_llava()
    kept = ["layers.5.self_attn"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=kept)).eval()
    outputs = []
    for one_of_them in (model, plain):
        with vtp.prune(one_of_them, vtp.RandomPruning(2, 0.3)), torch.no_grad():
            outputs.append(one_of_them(**three()).logits[:, -1])
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5)
