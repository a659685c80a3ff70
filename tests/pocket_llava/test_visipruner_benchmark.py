"""The comparison of VisiPruner with its rivals: what is chosen, and that all of it runs."""

import json
import sys

import pytest
from PIL import Image

from benchmarks.pocket_llava import visipruner
from vtp_kernels.accounting import Course, account
from vtp_kernels.methods import VisiPruner
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


def row(exact_match, saved):
    return {"exact_match": exact_match, "prefill_flops_reduction": saved}


def test_the_most_thrifty_of_those_that_lose_little_is_taken():
    rows = [row(0.99, 0.2), row(0.985, 0.4), row(0.98, 0.6)]
    assert visipruner.best(rows, row(0.993, 0)) == 1
    assert visipruner.best(rows, row(0.989, 0)) == 2
    assert visipruner.best(rows, row(1.1, 0)) == 0  # all lose more than a point


def test_the_gentlest_of_those_that_save_what_the_paper_does_is_taken():
    rows = [row(0.99, 0.4), row(0.98, 0.56), row(0.97, 0.6)]
    assert visipruner.thrifty(rows) == 1
    assert visipruner.thrifty(rows[:1]) == 0  # none saves as much


def test_labels_name_what_is_not_the_default():
    assert visipruner.label(VisiPruner()) == "visipruner"
    method = VisiPruner(("middle", "deep"), shallow_layers=1)
    assert visipruner.label(method) == "visipruner:stages=middle+deep,shallow_layers=1"


@pytest.mark.parametrize("make", visipruner.RIVALS)
@pytest.mark.parametrize("saved", (0.35, 0.5))
def test_rivals_save_as_much(make, saved):
    config = visipruner.load(TRAINED, device="cpu", dtype="float32")[0].config.text_config
    settings = {"text": 12, "before": 0, "visual": scenes.GRID**2, "course": Course()}
    method = visipruner.as_thrifty(make, config, 12, saved)
    spent = account(config, method, **settings).flops / account(config, None, **settings).flops
    assert 1 - spent == pytest.approx(saved, abs=0.01)


def test_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(visipruner, "GRID", visipruner.GRID[:1])
    counts = ["--calibration", "5", "--questions", "5"]
    files = ["--json", str(tmp_path / "it.json"), "--picture", str(tmp_path / "it.png")]
    monkeypatch.setattr(sys, "argv", ["visipruner", *counts, *files])
    visipruner.main()
    result = json.loads((tmp_path / "it.json").read_text())
    kinds = [x["method"].split(":")[0] for x in result["rows"]]
    assert kinds == ["none", "visipruner", "fastv", "fastv", "pyramiddrop", "random"]
    assert [x["split"] for x in result["calibration"]] == ["calibration"] * 2
    assert Image.open(tmp_path / "it.png").width >= 4 * visipruner.SIDE
