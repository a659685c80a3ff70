"""SparseVLM against the paper's formulas, prompt by prompt in float64."""

import math

import numpy as np
import pytest
import torch
from layer_seen import observed
from pictures_seen import PROMPTS, Pictures, by_rank, check_kept, nearest

import vtp_kernels as vtp
from near_ties import apart, away, until_clear
from vtp_kernels.methods.budget import visual_budget


def raters(rows, b):
    """Columns of text that have a larger share than the mean."""
    hidden = rows.hidden[b].double().numpy()
    seen = rows.visual[b].cumsum(0) > 0
    text = (rows.text[b] & seen).nonzero()[:, 0].tolist()
    if not text:
        return []
    logits = hidden[rows.visual[b].numpy()] @ hidden[text].T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    shares = (weights / weights.sum(1, keepdims=True)).mean(0)
    away(shares, shares.mean())
    above = [c for c, share in zip(text, shares, strict=True) if share > shares.mean() + 1e-9]
    return above or text


def attention(rows, b, paying):
    """Mean over heads and over the rows that pay."""
    seen = rows._observation
    queries, keys = seen.all_queries[b].double(), seen.all_keys[b].double()
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    logits = queries @ keys.transpose(1, 2) * seen.scale
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril() & rows.valid[b]
    weights = logits.masked_fill(~causal, -torch.inf).softmax(2)
    return weights[:, paying].mean((0, 1)).tolist()


def recycled(rows, b, columns, k, recycle, scores):
    """What stays of some rows, k of them, and {row: content} of centres."""
    if not recycle or k in (0, len(columns)):
        return by_rank(columns, scores)[:k], {}
    pool = math.floor(0.3 * (len(columns) - k) + 0.5)
    few = min(max(math.floor(0.1 * pool + 0.5), int(pool > 1)), k)
    ranked = by_rank(columns, scores)
    stay, pool = ranked[: k - few], sorted(ranked[k - few : k - few + pool])
    centres = pool[:: len(pool) // few][:few] if few else []
    hidden = rows.hidden[b].double().numpy()
    of = {c: [c] for c in centres}
    for c in pool:
        if c not in centres and centres:
            of[nearest(centres, hidden[c], hidden)].append(c)
    return stay + centres, {c: hidden[rest].mean(0) for c, rest in of.items()}


@pytest.mark.parametrize("per", ["prompt", "picture"])
@pytest.mark.parametrize("recycle", [True, False])
def test_against_the_formulas(draw, per, recycle):
    """In two stages, the second with what the first has merged."""
    rng = np.random.default_rng(draw.integer(0, 2**31))

    def check(case):
        counts = sorted(rng.integers(0, 24, 2).tolist(), reverse=True)
        keep = [tuple(counts), tuple(n / 24 for n in counts)][case % 2]
        pictures = Pictures(PROMPTS, rng)
        method = vtp.SparseVLM((2, 4), keep, recycle, per)
        assert method.decide(0, pictures.rows) is None
        paying = [raters(pictures.rows, b) for b in range(len(PROMPTS))]
        at_start = [len(columns) for _, columns in pictures.groups(per)]
        for layer, share in zip((2, 4), keep, strict=True):
            rows = pictures.rows
            rows._observation = observed(rng, *rows.visual.shape)
            kept, found = method.decide(layer, rows), []
            for (b, columns), size in zip(pictures.groups(per), at_start, strict=True):
                k = min(visual_budget(share, size), len(columns))
                pay = [i for i, at in enumerate(rows.origin[b].tolist()) if at in paying[b]]
                pay = [i for i in pay if rows.text[b, i]]
                scores = apart(attention(rows, b, pay)) if pay else []
                found.append((b, *recycled(rows, b, columns, k, recycle, scores)))
            check_kept(pictures, kept, [(b, stay) for b, stay, _ in found])
            expected = rows.hidden.clone()
            for b, _, content in found:
                for centre, value in content.items():
                    expected[b, centre] = torch.from_numpy(value)
            merged = rows.hidden if kept.hidden is None else kept.hidden
            for b, stay, _ in found:
                torch.testing.assert_close(merged[b, stay], expected[b, stay])
            pictures.let_rows_leave(kept)

    for case in range(12):
        until_clear(check, case)


def test_words_that_are_all_alike_are_all_raters():
    rng = np.random.default_rng(0)
    pictures = Pictures([[("text", 1), ("picture", 2, 3), ("text", 3)]], rng)
    rows = pictures.rows
    rows.hidden[:, -3:] = rows.hidden[:, -1:]
    method = vtp.SparseVLM((2,), (2,))
    method.decide(0, rows)
    assert rows.memory["raters"][0].nonzero()[:, 0].tolist() == [7, 8, 9]


def test_settings():
    with pytest.raises(ValueError, match=r"SparseVLM\.layers: tokens are ranked by the attention"):
        vtp.SparseVLM((0, 2), (0.5, 0.2))
    with pytest.raises(ValueError, match=r"SparseVLM: 2 layers .* but 1 values of keep"):
        vtp.SparseVLM((1, 2), (0.5,))
    with pytest.raises(ValueError, match=r"SparseVLM\.layers\[1\]: layers must ascend"):
        vtp.SparseVLM((4, 2), (0.5, 0.2))
    with pytest.raises(TypeError, match=r"SparseVLM\.recycle: expected a bool, got 1"):
        vtp.SparseVLM(recycle=1)
    spec = "sparsevlm:layers=2,keep=64,recycle=false,per=frame"
    assert vtp.method(spec) == vtp.SparseVLM((2,), (64,), False, "frame")
    assert vtp.method("sparsevlm:layers=2+4,keep=0.5+0.2") == vtp.SparseVLM((2, 4), (0.5, 0.2))
