"""The comparison of LVPruning with its rivals: what is compared, and that all of it runs."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.pocket_llava import lvpruning
from vtp_kernels.accounting import Course, account
from vtp_kernels.methods import LVPruning
from vtp_kernels.methods.lvpruning.files import load_deciders, read_fit
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


@pytest.fixture(scope="module")
def config():
    return lvpruning.load(TRAINED, device="cpu", dtype="float32")[0].config.text_config


def visual(config, method):
    found = account(config, method, text=9, before=0, visual=scenes.GRID**2, course=Course())
    return found.visual_per_layer


@pytest.mark.parametrize("ratios", [*lvpruning.RATIOS, (0.3, 0.15, 0.05)])
def test_rivals_keep_as_many_tokens(config, ratios):
    ours = visual(config, LVPruning(None, lvpruning.RECIPE.layers, ratios))
    found = lvpruning.rivals(ratios)
    labels = [f"{name}, {','.join(map(str, ratios))}" for name in ("random", "last token")]
    assert [visual(config, found.pop(label)) for label in labels] == [ours, ours]
    for fastv in found.values():
        assert sum(visual(config, fastv)) == pytest.approx(sum(ours), abs=4)


def test_without_any_tokens_left_fastv_cannot_compare():
    assert len(lvpruning.rivals((0.3, 0.15, 0.05))) == 2 and len(lvpruning.rivals((1, 1, 1))) == 3


def test_trainings_are_joined():
    rows = [
        {
            "method": name,
            "exact_match": right,
            "exact_match_by_kind": {"count": right},
            "visual_tokens_share": 0.3,
            "prefill_flops_reduction": 0.6,
        }
        for name, right in (("a", 0.9), ("b", 0.97))
    ]
    joined = lvpruning.joined(rows, "it")
    assert joined["method"] == "it (2 trainings: 90.0 to 97.0)"
    assert joined["exact_match"] == joined["exact_match_by_kind"]["count"] == pytest.approx(0.935)


def test_deciders_are_trained_and_measured(monkeypatch, tmp_path):
    recipe = replace(lvpruning.RECIPE, width=8, batch=2, micro_batch=2)
    for name, value in (("RECIPE", recipe), ("QUESTIONS", 2), ("DECIDERS", tmp_path / "shipped")):
        monkeypatch.setattr(lvpruning, name, value)
    monkeypatch.setattr(lvpruning, "RATIOS", ((0.5, 0.3, 0.1),))
    command = ["lvpruning", "--train", "--seeds", "0", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    lvpruning.main()
    shipped = sorted((tmp_path / "shipped").iterdir())
    assert [folder.name for folder in shipped] == ["seed-0", "seed-3"]
    assert {p.dtype for p in load_deciders(shipped[0]).parameters()} == {torch.float16}
    json_file = tmp_path / "it.json"
    monkeypatch.setattr(sys, "argv", ["lvpruning", "--questions", "5", "--json", str(json_file)])
    lvpruning.main()
    result = json.loads(json_file.read_text())
    kinds = [row["method"].split(",")[0].split(":")[0] for row in result["rows"]]
    assert kinds == ["none", "lvpruning", "random", "last token", "fastv"]
    trainings = [row["method"] for row in result["asked"] if row["method"].startswith("lvpruning:")]
    assert trainings == ["lvpruning:seed-0:0.5,0.3,0.1", "lvpruning:seed-3:0.5,0.3,0.1"]
    monkeypatch.setattr(lvpruning, "evaluate", None)  # a second run asks nothing anew
    lvpruning.main()
    assert json.loads(json_file.read_text())["rows"] == result["rows"]


@pytest.mark.parametrize("folder", sorted(lvpruning.DECIDERS.glob("seed-*")), ids=lambda x: x.name)
def test_shipped_deciders_fit_the_model_and_are_small(config, folder):
    fit = read_fit(folder)
    fit.check("llava", config, "shipped")
    assert fit.shape.layers == lvpruning.RECIPE.layers
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
