"""However the work of select_diverse is shared out, the same rows are chosen, bit for bit."""

import pytest
import torch

from emulator import build
from near_ties import apart, until_clear
from vtp_kernels import reference

RULES = ("maxmin", "dpp")
PRODUCTS, SQUARES = "select_diverse: products", "select_diverse: squares"
IN_CLUSTERS, BY_BLOCKS = "select_diverse in clusters", "select_diverse: steps"


@pytest.fixture
def run(kernels):
    """A function that runs the op for an architecture: its indices, and the launches it made."""

    def run(features, k, rule, relevance=None, architecture=90):
        before = kernels.launches()
        with build.architecture(kernels, architecture):
            indices, counts = torch.ops.vtp_kernels_emulated.select_diverse(
                features, None, k, rule, relevance, None, None, -1, k
            )
        assert counts.tolist() == (indices >= 0).sum(1).tolist()
        launched = {
            name for name, number in kernels.launches().items() if number > before.get(name, 0)
        }
        return indices, launched

    return run


@pytest.mark.parametrize("rule", RULES)
def test_large_tiles_give_what_small_ones_give(run, draw, rule):
    """Ten rows of two large tiles are enough for them; one row is not."""
    features = draw.normal(10, 129, 72).bfloat16()
    together, _ = run(features, 9, rule)
    for b in range(10):
        assert torch.equal(run(features[b : b + 1], 9, rule)[0], together[b : b + 1])


@pytest.mark.parametrize("rule, channels", [("dpp", 40), ("dpp", 8), ("maxmin", 8)])
def test_clusters_choose_what_blocks_choose(run, set_shared_limit, draw, rule, channels):
    """The factor of dpp is in shared memory where that is large enough, else in the workspace."""
    features = draw.normal(2, 100, channels)
    relevance = draw.uniform(2, 100) if rule == "dpp" else None
    set_shared_limit(64 << 10)
    want, launched = run(features, 100, rule, relevance)
    assert IN_CLUSTERS in launched and BY_BLOCKS not in launched
    for limit in (54 << 10, 64 << 10):  # 100 factors of 128 columns take 50.4 KB, the rest 4.4
        set_shared_limit(limit)
        got, launched = run(features, 100, rule, relevance, 80)
        assert BY_BLOCKS in launched and torch.equal(got, want)


def test_a_thread_has_sixteen_columns_of_a_long_row(run, draw):
    order = draw.uniform(1, 1025, 20).argsort(-1)
    signs = 2.0 * draw.bools(1, 1025, 20) - 1.0
    features = signs.masked_fill(order > 3, 0.0)  # of exact cosines
    got, launched = run(features.bfloat16(), 40, "maxmin")
    assert PRODUCTS in launched
    assert torch.equal(got, reference.select_diverse(features, 40).indices)


def test_no_matrix_of_too_many_rows(run, draw):
    def check():
        features, relevance = draw.normal(1, 16385, 20).half(), draw.uniform(1, 16385)
        first = relevance.argmax()
        x = torch.nn.functional.normalize(features[0].double(), dim=-1)
        left = (1.0 - (x @ x[first]).square()).clamp(min=0.0)
        gain = (relevance[0] * left.sqrt()).index_fill(0, first, 0.0)
        for values in (relevance[0], gain):
            apart(values.topk(2).values.tolist())
        got, launched = run(features, 2, "dpp", relevance)
        assert SQUARES in launched and PRODUCTS not in launched
        assert got[0].tolist() == sorted([first.item(), gain.argmax().item()])

    until_clear(check)
