"""HiPrune against the paper's rule, picture by picture."""

import math

import numpy as np
import pytest
from pictures_seen import PROMPTS, Pictures, by_rank, check_kept

import vtp_kernels as vtp
from vtp_kernels.contract.vision import Ask
from vtp_kernels.methods.budget import visual_budget

MIDDLE, DEEP = Ask("received", 0.375), Ask("received")


def hierarchical(pictures, b, columns, keep, around):
    k = visual_budget(keep, len(columns))
    middle, deep = ({c: pictures.value(ask, b, c) for c in columns} for ask in (MIDDLE, DEEP))
    kept = by_rank(columns, middle)[: math.floor(k * around / 5 + 0.5)]
    cross = set()
    for anchor in kept:
        if pictures.token(b, anchor) is None:
            continue
        picture, token = pictures.token(b, anchor)
        height, width = pictures.sizes[picture]
        y, x = divmod(token, width)
        for down, right in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= down < height and 0 <= right < width:
                cross.add((picture, down * width + right))
    buffers = [c for c in columns if c not in kept and pictures.token(b, c) in cross]
    kept = kept + by_rank(buffers, deep)[: k - len(kept)]
    registers = by_rank([c for c in columns if c not in kept], deep)
    return kept + registers[: k - len(kept)]


@pytest.mark.parametrize("per", ["prompt", "picture"])
@pytest.mark.parametrize("newlines", [False, True])
def test_against_the_rule(draw, per, newlines):
    rng = np.random.default_rng(draw.integer(0, 2**31))
    for case in range(12):
        keep = [int(rng.integers(0, 24)), float(rng.random())][case % 2]
        around = [0.1, 0.5, 1.0][case % 3]
        pictures = Pictures(PROMPTS, rng, (MIDDLE, DEEP), newlines, ties=case % 4 == 3)
        kept = vtp.HiPrune(keep, around, per=per).decide(0, pictures.rows)
        expected = [
            (b, hierarchical(pictures, b, columns, keep, around))
            for b, columns in pictures.groups(per)
        ]
        check_kept(pictures, kept, expected)


def test_layers_of_the_paper():
    middle, deep = vtp.HiPrune().vision_source()
    assert middle.index(24) == 8 and deep.layer is None
    assert vtp.HiPrune(middle=0.5).vision_source()[0].index(32) == 15


def test_settings():
    with pytest.raises(ValueError, match=r"HiPrune\.around: a share .* got 1\.5"):
        vtp.HiPrune(around=1.5)
    with pytest.raises(TypeError, match=r"HiPrune\.around: expected a share of keep, got True"):
        vtp.HiPrune(around=True)
    with pytest.raises(ValueError, match=r"HiPrune\.middle: a share lies above 0\.0, .* got 0\.0"):
        vtp.HiPrune(middle=0.0)
    with pytest.raises(TypeError, match=r"HiPrune\.middle: a layer of the vision tower is an int"):
        vtp.HiPrune(middle="deep")
    assert vtp.method("hiprune:keep=32,middle=-2") == vtp.HiPrune(32, middle=-2)
