"""Which tokens the vLLM plugin keeps, against choices made one by one."""

import pytest
import torch

from vtp_kernels import reference
from vtp_kernels.vllm.choice import attention_of_cls, best_rows, shares, similarity_to_cls


@pytest.mark.parametrize(
    ("keep", "tokens", "expected"),
    [
        (10, [576], [10]),
        (10, [5], [5]),
        (10, [576, 576, 1], [5, 4, 1]),
        (11, [576, 576, 576], [4, 4, 3]),
        (11, [4, 0, 9, 9], [4, 0, 4, 3]),
        (2, [9, 9, 9], [1, 1, 0]),
        (99, [3, 4], [3, 4]),
    ],
)
def test_shares(keep, tokens, expected):
    assert shares(keep, tokens) == expected


def test_shares_are_as_even_as_the_views_allow(draw):
    for _ in range(200):
        tokens = [draw.integer(0, 12) for _ in range(draw.integer(1, 7))]
        keep = draw.integer(1, 60)
        found = shares(keep, tokens)
        assert sum(found) == min(keep, sum(tokens))
        assert all(share <= count for share, count in zip(found, tokens, strict=True))
        # Whoever has fewer than another by more than one has all of its own.
        for share, count in zip(found, tokens, strict=True):
            assert share >= max(found) - 1 or share == count


def test_scores_are_those_of_the_cls_row(draw):
    hidden = draw.normal(3, 17, 32)
    torch.testing.assert_close(
        similarity_to_cls(hidden),
        torch.nn.functional.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1),
    )
    query, key = draw.normal(3, 4, 17, 8), draw.normal(3, 4, 17, 8)
    weights = torch.softmax(query[:, :, :1] @ key.transpose(2, 3) * 0.3, -1)
    torch.testing.assert_close(attention_of_cls(query, key, 0.3), weights.mean(1)[:, 0, 1:])


def rows_one_by_one(scores, shows, keep):
    """Of each view the best of those that have a row, then in the order of the rows."""
    width = len(scores[0])
    shown = [
        sorted(t for t in shows if t // width == view and t >= 0) for view in range(len(scores))
    ]
    chosen = set()
    for share, tokens in zip(shares(keep, [len(t) for t in shown]), shown, strict=True):
        chosen |= set(sorted(tokens, key=lambda t: (-scores[t // width][t % width], t))[:share])
    newlines = keep - len(chosen)
    kept = []
    for token in shows:
        if token >= 0 and token in chosen:
            kept.append(token)
        elif token < 0 and newlines > 0:
            kept.append(-1)
            newlines -= 1
    return kept


@pytest.mark.parametrize("views", [1, 3])
def test_rows_that_stay(draw, views):
    width = 9
    for _ in range(30):
        scores = draw.integers(0, 5, views, width).float()  # with ties
        shown = torch.randperm(views * width, generator=draw.generator)
        shown = shown[: draw.integer(1, views * width + 1)].tolist()
        shows = shown + [-1] * draw.integer(0, 4)
        order = torch.randperm(len(shows), generator=draw.generator).tolist()
        shows = [shows[i] for i in order]
        keep = draw.integer(1, len(shows) + 1)
        rows = best_rows(scores, torch.tensor(shows), keep)
        assert rows.tolist() == rows_one_by_one(scores.tolist(), shows, keep)


def test_one_view_keeps_what_select_topk_does(draw):
    scores = draw.normal(1, 49)
    expected = reference.select_topk(scores, 12).indices[0]
    assert torch.equal(best_rows(scores, torch.arange(49), 12), expected)
