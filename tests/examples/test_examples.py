"""Every example runs as its first lines say, and prints what it is about."""

import base64
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import vtp_kernels as vtp
from vtp_kernels.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What a script prints, run as by its name on a command line, in a folder of its own."""

    def ran(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return ran


def test_prune_one_call(run, tmp_path):
    said = run("prune_one_call.py")
    dense, pruned = re.findall(r"^(?:dense|pruned): +(.+)$", said, re.MULTILINE)
    assert dense == pruned == "6" and "256 visual: 128 from layer 2" in said
    for name in ("vtp_kept.png", "vtp_layers.png"):
        assert Image.open(tmp_path / name).width > 400


def test_serve_requests(run):
    answers = run("serve_requests.py").splitlines()
    saved = [re.search(r"\((\S+), (\d+)% of", line).groups() for line in answers]
    assert [method for method, _ in saved] == ["dense", "fastv:2:0.5", "fastv:2:0.5", "random:0.5"]
    assert [int(share) for _, share in saved] == [0, 40, 40, 53]


def test_own_method(run, monkeypatch):
    monkeypatch.setitem(METHODS, "unusual", None)  # its key goes with the test
    monkeypatch.delitem(METHODS, "unusual")
    said = run("own_method.py")
    unusual, chance = (int(right) for right in re.findall(r": (\d+) of 40 right", said))
    assert unusual > chance + 8  # it is better than the yardstick, or no example


def test_ops_alone(run):
    said = run("ops_alone.py")
    assert said.splitlines() == [
        "rows in the second layer: 32 of 80",
        "keys in the first layer's cache: 32 of 80",
    ]


def test_calibrate_schedule(run, tmp_path):
    said = run("calibrate_schedule.py", "made.json")
    schedule = vtp.Method.load(tmp_path / "made.json")
    assert isinstance(schedule, vtp.Schedule) and list(schedule.keep) == [1]
    assert 0.05 < schedule.keep[1] < 0.3 and str(schedule.to_dict()) in said
    assert min(int(right) for right in re.findall(r": (\d+) of 20 right", said)) >= 18


def test_every_script_is_tested_and_named_on_a_page():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
    page = (ROOT / "docs" / "getting_started.md").read_text()
    assert [path.name for path in EXAMPLES.iterdir() if f"examples/{path.name}" not in page] == []


class Notebook:
    """Its code cells, run in one namespace as Jupyter does, the last line of each shown."""

    def __init__(self, path):
        self.stored = json.loads(path.read_text())
        self.names = {"__name__": "__main__"}

    def run(self):
        """What each cell shows, by its id."""
        shown = {}
        for cell in self.stored["cells"]:
            if cell["cell_type"] == "code":
                *lines, last = "".join(cell["source"]).rstrip().split("\n")
                exec("\n".join(lines), self.names)
                shown[cell["id"]] = eval(last, self.names)
        return shown


def test_what_each_method_keeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = Notebook(EXAMPLES / "what_each_method_keeps.ipynb")
    shown = notebook.run()
    assert notebook.stored["nbformat"] == 4
    assert [cell["id"] for cell in notebook.stored["cells"] if cell["cell_type"] == "code"] == [
        *("picture", "dense", "methods", "kept", "layers", "knee", "yours"),
    ]
    assert shown["dense"] == shown["methods"]["FastV"] == "6"
    assert len(shown["methods"]) == 6
    stored = {cell["id"]: cell.get("outputs") for cell in notebook.stored["cells"]}
    for name in ("picture", "kept", "layers", "knee"):  # what is in the file is of that size, too
        (output,) = stored[name]
        size = (shown[name].width, shown[name].height)
        assert png_size(output["data"]["image/png"]) == size


def png_size(encoded):
    return Image.open(io.BytesIO(base64.b64decode("".join(encoded)))).size
