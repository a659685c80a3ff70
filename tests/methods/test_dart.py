"""DART against the paper's rule, prompt by prompt in float64."""

import numpy as np
import pytest
from layer_seen import observed
from pictures_seen import PROMPTS, Pictures, by_rank, check_kept, cosine

import vtp_kernels as vtp
from near_ties import apart, until_clear
from vtp_kernels.methods.budget import visual_budget


def not_duplicated(pictures, b, columns, keep, visual_pivots, text_pivots):
    rows = pictures.rows
    k = visual_budget(keep, len(columns))
    keys = apart(rows._observation.all_keys[b].double().abs().sum((0, 2)).tolist())
    hidden = rows.hidden[b].double().numpy()
    seen = rows.visual[b].cumsum(0) > 0
    text = (rows.text[b] & seen).nonzero()[:, 0].tolist()
    kept = by_rank(columns, keys)[: min(visual_pivots, k)]
    pivots = kept + by_rank(text, keys)[:text_pivots]
    each, more = divmod(k - len(kept), len(pivots)) if pivots else (0, 0)
    for index, pivot in enumerate(pivots):
        left = [c for c in columns if c not in kept]
        unlike = apart({c: -cosine(hidden[pivot], hidden[c]) for c in left})
        kept = kept + by_rank(left, unlike)[: each + (index < more)]
    return kept


@pytest.mark.parametrize("per", ["prompt", "picture"])
def test_against_the_rule(draw, per):
    rng = np.random.default_rng(draw.integer(0, 2**31))

    def check(case):
        keep = [int(rng.integers(0, 24)), float(rng.random())][case % 2]
        pivots = [(4, 4), (0, 2), (3, 0), (1, 9)][case % 4]
        pictures = Pictures(PROMPTS, rng)
        pictures.rows._observation = observed(rng, *pictures.rows.visual.shape)
        kept = vtp.DART(2, keep, *pivots, per=per).decide(2, pictures.rows)
        expected = [
            (b, not_duplicated(pictures, b, columns, keep, *pivots))
            for b, columns in pictures.groups(per)
        ]
        check_kept(pictures, kept, expected)

    for case in range(16):
        until_clear(check, case)


def test_settings():
    with pytest.raises(ValueError, match=r"DART\.layer: keys are those of the layer before"):
        vtp.DART(layer=0)
    with pytest.raises(ValueError, match=r"DART\.text_pivots: expected at least 0, got -1"):
        vtp.DART(text_pivots=-1)
    with pytest.raises(TypeError, match=r"DART\.visual_pivots: expected an int, got 0\.5"):
        vtp.DART(visual_pivots=0.5)
    with pytest.raises(ValueError, match=r"DART\.visual_pivots: expected a pivot at least"):
        vtp.DART(visual_pivots=0, text_pivots=0)
    assert vtp.method("dart:layer=3,keep=0.2") == vtp.DART(3, 0.2)
