"""VisionZip against the paper's formulas, picture by picture in float64."""

import numpy as np
import pytest
import torch
from pictures_seen import PROMPTS, Pictures, by_rank, check_kept, nearest

import vtp_kernels as vtp
from near_ties import until_clear
from vtp_kernels.contract.vision import Ask
from vtp_kernels.methods.budget import visual_budget

ATTENTION, KEYS = Ask("attention"), Ask("keys")


def zipped(pictures, b, columns, keep, contextual):
    """The columns that stay, and {column: content} of the contextual ones."""
    k = visual_budget(keep, len(columns))
    few = visual_budget(contextual, k)
    ranked = by_rank(columns, {c: pictures.value(ATTENTION, b, c) for c in columns})
    dominant = ranked[: k - few]
    rest = [c for c in columns if c not in dominant]
    shown = [c for c in rest if pictures.token(b, c) is not None]
    among = shown if len(shown) >= few else rest
    targets = among[:: max(len(among) // few, 1)][:few] if few else []
    joined = {target: [] for target in targets}
    zeros = np.zeros(3)
    keys = {c: pictures.value(KEYS, b, c) if c in shown else zeros for c in rest}
    for c in shown:
        if c not in targets and targets:
            joined[nearest(targets, keys[c], keys)].append(c)
    hidden = pictures.rows.hidden[b].double().numpy()
    content = {
        t: hidden[t] + (hidden[others].mean(0) if others else 0) for t, others in joined.items()
    }
    return dominant + targets, content


@pytest.mark.parametrize("per", ["prompt", "picture"])
@pytest.mark.parametrize("newlines", [False, True])
def test_against_the_formulas(draw, per, newlines):
    rng = np.random.default_rng(draw.integer(0, 2**31))

    def check(case):
        keep = [int(rng.integers(0, 24)), float(rng.random())][case % 2]
        contextual = [int(rng.integers(0, 6)), 0.15625, float(rng.random())][case % 3]
        pictures = Pictures(PROMPTS, rng, ("attention", "keys"), newlines, ties=case % 4 == 3)
        method = vtp.VisionZip(keep, contextual, per)
        kept = method.decide(0, pictures.rows)
        found = [
            (b, *zipped(pictures, b, columns, keep, contextual))
            for b, columns in pictures.groups(per)
        ]
        leaves = any(
            0 < len(stay) < len(columns)
            for (_, stay, _), (_, columns) in zip(found, pictures.groups(per), strict=True)
        )
        check_kept(pictures, kept, [(b, stay) for b, stay, _ in found])
        assert leaves or kept.hidden is None
        expected, merged = pictures.rows.hidden.clone(), torch.zeros(4, dtype=torch.int64)
        for b, _, content in found if leaves else ():
            merged[b] += len(content)
            for target, value in content.items():
                expected[b, target] = torch.from_numpy(value)
        if kept.hidden is None:
            assert not merged.any()
            return
        for b, stay, _ in found:
            torch.testing.assert_close(kept.hidden[b, stay], expected[b, stay])
        (event,) = method.events(pictures.rows.memory)
        assert event["layer"] == 0 and event["into"] == merged.tolist()

    for case in range(12):
        until_clear(check, case)


def test_the_paper_s_numbers_of_contextual_tokens():
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        assert visual_budget(vtp.VisionZip(keep).contextual, keep) == contextual


def test_settings():
    with pytest.raises(ValueError, match=r"VisionZip\.contextual: a share .* got 1\.5"):
        vtp.VisionZip(contextual=1.5)
    with pytest.raises(ValueError, match=r"VisionZip\.keep: cannot keep -1"):
        vtp.VisionZip(-1)
    with pytest.raises(ValueError, match=r"VisionZip\.per: got 'crop'"):
        vtp.VisionZip(per="crop")
    assert vtp.method("visionzip:keep=32,contextual=4,per=picture") == vtp.VisionZip(
        32, 4, "picture"
    )
