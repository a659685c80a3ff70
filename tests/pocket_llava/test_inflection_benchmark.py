"""The comparison of InflectionPruning with its rivals: what is chosen, and that all of it runs."""

import json
import sys

import pytest
from PIL import Image

from benchmarks.pocket_llava import inflection
from vtp_kernels.methods import InflectionPruning, method_from_spec
from vtp_kernels.pocket_llava import scenes


def row(exact_match, share):
    return {"exact_match": exact_match, "visual_tokens_share": share}


def test_what_is_chosen():
    rows = [row(0.9, 0.3), row(0.8, 0.22), row(0.8, 0.2), row(0.7, 0.1)]
    assert inflection.best_within(rows, 0.22) == 2  # equally good with fewer tokens
    assert inflection.best_within(rows, 0.15) == 3
    assert inflection.thriftiest(rows, row(0.9, 1.0), 0.1001) == 2
    assert inflection.thriftiest(rows, row(1.1, 1.0), 0.1) == 0  # all lose more than that


@pytest.mark.parametrize("method", [InflectionPruning(), *inflection.GRID, *inflection.RULES])
def test_labels_are_how_methods_are_written(method):
    assert method_from_spec(inflection.label(method)) == method


def test_rivals_keep_as_many_tokens():
    fastv, random = inflection.rivals(0.21, 8)
    assert (1 + 7 * fastv.keep) / 8 == pytest.approx(0.21, abs=0.001)
    assert random.keep == 0.21
    assert inflection.rivals(0.05, 8)[0].keep == 0.0  # all are there in layer 0


def test_runs_and_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(inflection, "GRID", inflection.GRID[:1])
    monkeypatch.setattr(inflection, "RULES", inflection.RULES[:2])
    counts = ["--calibration", "5", "--questions", "5"]
    files = ["--json", str(tmp_path / "it.json"), "--picture", str(tmp_path / "it.png")]
    monkeypatch.setattr(sys, "argv", ["inflection", *counts, *files])
    asked = []
    evaluate = inflection.evaluate

    def limited(*args):
        asked.append(args[-1])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(inflection, "evaluate", limited)
    with pytest.raises(KeyboardInterrupt):
        inflection.main()
    inflection.main()
    assert len(asked) == len(set(asked)) + 3  # "none" and the rule on two splits; one asked again
    result = json.loads((tmp_path / "it.json").read_text())
    kinds = [x["method"].split(":")[0] for x in result["rows"]]
    assert kinds == "none inflection fastv random objects visipruner inflection".split()
    assert [x["split"] for x in result["calibration"]] == ["calibration"] * 2
    objects = next(x for x in result["rows"] if x["method"].startswith("objects"))
    share = result["rows"][1]["visual_tokens_share"]
    assert objects["visual_tokens_share"] == pytest.approx(share, abs=0.5 / scenes.GRID**2)
    assert Image.open(tmp_path / "it.png").width > 4 * inflection.PANEL
