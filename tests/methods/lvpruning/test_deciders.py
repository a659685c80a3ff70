"""The networks that decide: against the paper's formulas told again, their size and their cost."""

import pytest
import torch
from torch.nn.functional import layer_norm, silu, softmax
from torch.utils.flop_counter import FlopCounterMode

from vtp_kernels.methods.lvpruning.deciders import Decider, Deciders, Shape


def by_hand(decider, visual, text):
    """One prompt, head by head: visual [N, C], text [T, C] -> [N, 2]."""
    rows = visual
    for block in decider.blocks:
        query, key, value = (
            getattr(block, f"{name}_proj")(x)
            for name, x in zip("qkv", (rows, text, text), strict=True)
        )
        size = query.shape[1] // 8
        parts = []
        for head in range(8):
            q, k, v = (x[:, head * size : (head + 1) * size] for x in (query, key, value))
            parts.append(softmax(q @ k.T / size**0.5, dim=1) @ v)
        output = block.o_proj(torch.cat(parts, 1)) + query
        first, wide, _, narrow, last = block.ffn
        inner = layer_norm(output, output.shape[1:], first.weight, first.bias)
        inner = narrow(silu(wide(inner)))
        rows = layer_norm(inner, inner.shape[1:], last.weight, last.bias)
    return decider.head(rows)


@pytest.mark.parametrize("width", (48, 16))
def test_logits_are_those_of_the_paper(draw, width):
    decider = Decider(48, width).double()
    for parameter in decider.parameters():
        parameter.data += 0.1 * draw.normal(*parameter.shape, dtype=torch.float64)
    visual, text = draw.normal(2, 7, 48, dtype=torch.float64), draw.normal(2, 5, 48).double()
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        logits = decider(visual, text, valid)
        for b, words in enumerate((5, 3)):
            torch.testing.assert_close(logits[b], by_hand(decider, visual[b], text[b, :words]))


def test_what_is_no_text_does_not_matter(draw):
    decider = Decider(32, 16)
    visual, text = draw.normal(1, 4, 32), draw.normal(1, 3, 32)
    alone = decider(visual, text, None)
    padded = torch.cat((text, 1e6 * draw.normal(1, 2, 32)), 1)
    valid = torch.tensor([[True] * 3 + [False] * 2])
    torch.testing.assert_close(decider(visual, padded, valid), alone)


def test_a_decider_of_the_paper_has_268_million_parameters():
    with torch.device("meta"):
        deciders = Deciders(Shape(4096, 4096, (1, 8, 16)))
    sizes = [sum(p.numel() for p in deciders[layer].parameters()) for layer in (1, 8, 16)]
    assert len(set(sizes)) == 1 and sizes[0] / 1e6 == pytest.approx(268, abs=1)


@pytest.mark.parametrize("width", (48, 16))
def test_flops_are_those_that_torch_counts(width):
    shape = Shape(48, width, (3,))
    decider = Deciders(shape)[3]
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        decider(torch.randn(1, 20, 48), torch.randn(1, 6, 48), None)
    assert shape.flops(6, 20) == counter.get_total_flops()


@pytest.mark.parametrize("width", (0, 4, 20, -8))
def test_a_width_that_eight_heads_cannot_share(width):
    with pytest.raises(ValueError, match=f"width: .*multiple of 8; got {width}"):
        Shape(64, width, (1,))
