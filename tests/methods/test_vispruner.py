"""VisPruner against the paper's rounds, picture by picture in float64."""

import numpy as np
import pytest
import torch
from pictures_seen import PROMPTS, Pictures, by_rank, check_kept, cosine

import vtp_kernels as vtp
from near_ties import apart, until_clear
from vtp_kernels.contract.vision import Ask
from vtp_kernels.methods.budget import visual_budget

ATTENTION = Ask("attention")
LARGE = ([("text", 1), ("picture", 9, 8), ("text", 2)], [("picture", 6, 5), ("text", 3)])


def distinct(pictures, b, columns, keep, important):
    k = visual_budget(keep, len(columns))
    ranked = by_rank(columns, {c: pictures.value(ATTENTION, b, c) for c in columns})
    kept, others = ranked[: int(k * important)], ranked[int(k * important) :]
    nothing = [c for c in others if pictures.token(b, c) is None]
    left = [c for c in others if c not in nothing]
    features = {c: pictures.value("features", b, c) for c in left}
    k -= len(kept)
    while len(left) > k:
        even, odd = left[::2], left[1::2]
        nearest = {
            c: max((cosine(features[c], features[o]) for o in odd), default=-np.inf) for c in even
        }
        apart(nearest)
        even = sorted(even, key=lambda c: -nearest[c])  # stable
        left = even[min(8, len(left) - k) :] + odd
    return kept + (left + nothing)[:k]


@pytest.mark.parametrize("prompts", [PROMPTS, LARGE])
@pytest.mark.parametrize("per", ["prompt", "picture"])
@pytest.mark.parametrize("newlines", [False, True])
def test_against_the_rounds(draw, per, newlines, prompts):
    rng = np.random.default_rng(draw.integer(0, 2**31))

    def check(case):
        keep = [int(rng.integers(0, 24)), float(rng.random())][case % 2]
        important = [0.5, 0.0, 1.0, float(rng.random())][case % 4]
        pictures = Pictures(prompts, rng, ("attention",), newlines)
        kept = vtp.VisPruner(keep, important, per).decide(0, pictures.rows)
        expected = [
            (b, distinct(pictures, b, columns, keep, important))
            for b, columns in pictures.groups(per)
        ]
        check_kept(pictures, kept, expected)

    for case in range(6):
        until_clear(check, case)


def test_rows_that_are_not_finite_are_the_first_to_leave(draw):
    """But for those that attention has chosen."""
    rng = np.random.default_rng(draw.integer(0, 2**31))
    pictures = Pictures(LARGE, rng, ("attention",))
    bad = torch.from_numpy(rng.permutation(30)[:10])
    for value in (torch.nan, torch.inf):
        pictures.seen.features[1, bad] = value
        pictures.rows.memory.clear()
        kept = vtp.VisPruner(20, 0.0).decide(0, pictures.rows)
        stays = kept.selection.indices[1, : kept.selection.counts[1]]
        shown = [pictures.token(1, c)[1] for c in stays.tolist() if pictures.rows.visual[1, c]]
        assert len(shown) == 20 and not set(shown) & set(bad.tolist())


def test_settings():
    with pytest.raises(ValueError, match=r"VisPruner\.important: a share .* got -0\.1"):
        vtp.VisPruner(important=-0.1)
    with pytest.raises(TypeError, match=r"VisPruner\.important: expected a share of keep, got '1'"):
        vtp.VisPruner(important="1")
    assert vtp.method("vispruner:keep=0.2,important=0.25") == vtp.VisPruner(0.2, 0.25)
