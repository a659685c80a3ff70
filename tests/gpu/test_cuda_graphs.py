"""A captured call reads everything anew at each replay: numbers, masks, counts, k and indices."""

import pytest
import torch
from variants import LONG, VARIANTS, assert_same_bits, cloned, emptied, filled, refill

REHEARSED = ("test_",)


def captured(call, *arguments) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of one call and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*arguments)  # loads the kernels, which a capture may not do
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*arguments)
    return graph, got


def poison(tensors) -> None:
    for x in tensors:
        x.view(torch.uint8).fill_(0xA5)


CASES = [(variant, length) for variant in VARIANTS for length in (65, 577, 2880)]
CASES += [(variant, 20_000) for variant in LONG]


@pytest.mark.parametrize("variant, length", CASES, ids=str)
def test_replays_with_other_contents(draw, variant, length):
    """Captured while nothing is chosen: sizes that a kernel wrongly took from the contents would
    be zero."""
    if variant.op == "passive_attention" and length > 577:
        pytest.skip("its reference takes S * S numbers per head")
    first = variant.draw(draw, length)
    static = emptied(cloned(first))
    graph, got = captured(variant.call, static)
    for contents in (first, filled(first), emptied(first), variant.draw(draw, length)):
        refill(static, contents)
        if not variant.in_place:
            poison(got)
        graph.replay()
        assert_same_bits(got, variant.run(contents))
        variant.check(contents, got)


def test_one_graph_of_all_ops(draw):
    """Workspaces of calls that follow each other in a graph may share memory, never results."""
    static = [cloned(variant.draw(draw, 300)) for variant in VARIANTS]

    def step():
        return [
            variant.call(arguments) for variant, arguments in zip(VARIANTS, static, strict=True)
        ]

    fresh = [variant.draw(draw, 300) for variant in VARIANTS]
    graph, got = captured(step)
    for _ in range(2):
        for arguments, contents in zip(static, fresh, strict=True):
            refill(arguments, contents)
        graph.replay()
        for variant, contents, result in zip(VARIANTS, fresh, got, strict=True):
            assert_same_bits(result, variant.run(contents))
