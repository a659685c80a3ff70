"""Stand-ins for attention modules, used alone in model code of one's own."""

import pytest
import torch
from tiny_llava import tiny_llava
from torch import nn
from transformers import DynamicCache

from vtp_kernels.contract.passive import PassiveVisual
from vtp_kernels.models.attention.stand_ins import (
    PackedAttention,
    PassiveVisualAttention,
    ScoringAttention,
    SomeRowsAttention,
)
from vtp_kernels.selection import Selection

STAND_INS = {
    "passive": lambda attention: PassiveVisualAttention(attention, PassiveVisual("drop", "causal")),
    "some rows": SomeRowsAttention,
    "scoring": ScoringAttention,
    "packed": PackedAttention,
}


@pytest.fixture(params=("eager", "sdpa"))
def text(request):
    return tiny_llava(request.param).model.language_model


def inputs_of(text, draw, batch, rows, start=0):
    """hidden states and position embeddings of rows from `start` on."""
    hidden = draw.normal(batch, rows, 64)
    positions = torch.arange(start, start + rows).expand(batch, -1)
    return hidden, text.rotary_emb(hidden, position_ids=positions)


def causal(rows, past=0):
    seen = torch.ones(rows, past + rows, dtype=torch.bool).tril(past)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def weights_of(text, attention, hidden, embeddings, mask, cache=None):
    """The attention matrix, of the eager implementation."""
    before = text.config._attn_implementation
    text.config._attn_implementation = "eager"
    weights = attention(hidden, embeddings, attention_mask=mask, past_key_values=cache)[1]
    text.config._attn_implementation = before
    return weights


@pytest.mark.parametrize("name", STAND_INS)
def test_shares_the_weights_and_keeps_the_names(text, name):
    layer = text.layers[0]
    before = dict(layer.state_dict())
    stand_in = STAND_INS[name](layer.self_attn)
    assert isinstance(stand_in, nn.Module)
    assert stand_in.layer_idx == 0 and stand_in.head_dim == 16
    layer.self_attn = stand_in
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)


@torch.no_grad()
@pytest.mark.parametrize("name", STAND_INS)
def test_without_more_it_is_the_module_itself(text, draw, name):
    attention = text.layers[0].self_attn
    hidden, embeddings = inputs_of(text, draw, 2, 7)
    expected = attention(hidden, embeddings, attention_mask=causal(7))[0]
    got = STAND_INS[name](attention)(hidden, embeddings, attention_mask=causal(7))[0]
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("past", (0, 4))
@pytest.mark.parametrize("rows", (slice(-1, None), slice(2, 6), slice(None)))
def test_scores_are_the_mean_of_the_attention_matrix(text, draw, rows, past):
    attention = text.layers[1].self_attn
    caches = DynamicCache(), DynamicCache()
    if past:
        earlier, embeddings = inputs_of(text, draw, 2, past)
        for cache in caches:
            attention(earlier, embeddings, attention_mask=causal(past), past_key_values=cache)
    hidden, embeddings = inputs_of(text, draw, 2, 9, past)
    candidates = draw.bools(2, 9)
    mask = causal(9, past)
    output, scores = ScoringAttention(attention)(
        hidden,
        embeddings,
        attention_mask=mask,
        past_key_values=caches[0],
        candidates=candidates,
        rows=rows,
        past=past,
    )
    weights = weights_of(text, attention, hidden, embeddings, mask, caches[1])
    expected = weights[:, :, rows, past:].mean((1, 2)) * candidates
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert output.shape == hidden.shape


@torch.no_grad()
def test_some_rows_attend_among_themselves(text, draw):
    attention = text.layers[0].self_attn
    hidden, (cos, sin) = inputs_of(text, draw, 2, 8)
    indices = torch.tensor([[0, 2, 5, 7], [1, 4, 6, -1]])
    counts = torch.tensor([4, 3], dtype=torch.int32)
    silent = torch.zeros(2, 8, dtype=torch.bool)
    silent[0, 2] = True
    mask = causal(4).repeat(2, 1, 1, 1)
    mask[1, :, :, 0] = torch.finfo(torch.float32).min  # the shorter one has padding in front
    got, _ = SomeRowsAttention(attention)(
        hidden, (cos, sin), attention_mask=mask, rows=Selection(indices, counts), silent=silent
    )
    for b, count in enumerate((4, 3)):
        chosen = indices[b, :count]
        embeddings = cos[:1, chosen], sin[:1, chosen]
        alone = attention(hidden[b : b + 1, chosen], embeddings, attention_mask=causal(count))[0]
        expected = torch.zeros(8, 64)
        expected[chosen] = alone[0]
        expected[silent[b]] = 0
        torch.testing.assert_close(got[b], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_passive_rows_over_a_cache_count_it_as_text(text, draw):
    """In two steps, text first, as in one: passive tokens come later and see that text."""
    attention = text.layers[0].self_attn
    stand_in = PassiveVisualAttention(attention, PassiveVisual("merge", "prefix"))
    hidden, (cos, sin) = inputs_of(text, draw, 2, 10)
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[:, 5:8] = True
    whole, _ = stand_in(hidden, (cos, sin), visual=visual)
    cache = DynamicCache()
    first = stand_in(
        hidden[:, :4], (cos[:, :4], sin[:, :4]), None, cache, visual=visual[:, :4], past=0
    )[0]
    second = stand_in(
        hidden[:, 4:], (cos[:, 4:], sin[:, 4:]), None, cache, visual=visual[:, 4:], past=4
    )[0]
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-5, atol=1e-6)
