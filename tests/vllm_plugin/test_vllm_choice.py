"""Which tokens the vLLM plugin keeps, against choices made one by one."""

import math

import pytest
import torch

from vtp_kernels import reference
from vtp_kernels.vllm.choice import (
    attention_received,
    best_rows,
    scores_of_rows,
    similarity_to_whole,
    unlike_rows,
)


@pytest.mark.parametrize("cls", [True, False])
def test_scores_are_those_of_cls_or_of_what_stands_for_it(draw, cls):
    first = int(cls)
    hidden = draw.normal(3, 17, 32)
    whole = hidden[:, :1] if cls else hidden.mean(1, keepdim=True)
    torch.testing.assert_close(
        similarity_to_whole(hidden, cls),
        torch.nn.functional.cosine_similarity(hidden[:, first:], whole, dim=-1),
    )
    query, key = draw.normal(3, 4, 17, 8), draw.normal(3, 4, 17, 8)
    weights = torch.softmax(query @ key.transpose(2, 3) * 0.3, -1).mean(1)
    expected = weights[:, 0, 1:] if cls else weights.mean(1)
    torch.testing.assert_close(attention_received(query, key, 0.3, cls), expected)


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
        flat = scores.flatten().tolist()
        ranked = [-flat[token] if token >= 0 else math.inf for token in shows]
        expected = sorted(sorted(range(len(shows)), key=ranked.__getitem__)[:keep])
        rows = best_rows(scores_of_rows(scores, torch.tensor(shows)), keep)
        assert rows.tolist() == expected


def test_unlike_rows_are_those_of_divprune(draw):
    rows = draw.normal(49, 16)
    expected = reference.select_diverse(rows[None], 12).indices[0]
    assert torch.equal(unlike_rows(rows, 12), expected)
