"""Methods written as short strings."""

import importlib
import json
import sys

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels.methods import METHODS, method_from_spec, method_of


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("none", None),
        ("fastv", vtp.FastV()),
        ("fastv:3", vtp.FastV(layer=3)),
        ("fastv:2:0.5", vtp.FastV(layer=2, keep=0.5)),
        ("fastv:2:64", vtp.FastV(layer=2, keep=64)),
        ("fastv:2:1", vtp.FastV(layer=2, keep=1)),
        ("fastv:2:1.0", vtp.FastV(layer=2, keep=1.0)),
        ("fastv:2:8:frame", vtp.FastV(layer=2, keep=8, per="frame")),
        ("random", vtp.RandomPruning()),
        ("random:0.22", vtp.RandomPruning(layer=0, keep=0.22)),
        ("random:32:4", vtp.RandomPruning(layer=4, keep=32)),
        ("random:0.5:2:7", vtp.RandomPruning(layer=2, keep=0.5, seed=7)),
        ("random:0.5:2:7:picture", vtp.RandomPruning(2, 0.5, 7, per="picture")),
        ("pyramiddrop", vtp.PyramidDrop()),
        ("pyramiddrop:2=0.5,4=0.25", vtp.PyramidDrop((2, 4), (0.5, 0.25))),
        ("pyramiddrop:2=0.5,4=0.25:frame", vtp.PyramidDrop((2, 4), (0.5, 0.25), per="frame")),
        ("schedule:2=4:text:frame", vtp.Schedule({2: 4}, score="text", per="frame")),
        ("schedule:2=0.5,4=0.1", vtp.Schedule({2: 0.5, 4: 0.1})),
        ("schedule:2=64", vtp.Schedule({2: 64})),
        ("schedule:0=0.3:random", vtp.Schedule({0: 0.3}, score="random")),
        ("random:0.5:2:7:image", vtp.RandomPruning(2, 0.5, 7, per="picture")),
        ("divprune", vtp.DivPrune()),
        ("divprune:keep=0.1,per=image", vtp.DivPrune(0.1, per="picture")),
        ("cdpruner:keep=32", vtp.CDPruner(32)),
        ("framedifference:keep=0.5", vtp.FrameDifference(0.5)),
        ("vidcom2:keep=64,frames=pictures", vtp.VidCom2(64, frames="pictures")),
    ],
)
def test_specs(spec, method):
    assert method_from_spec(spec) == method
    if method is not None and not isinstance(method, vtp.Schedule):
        assert type(method_from_spec(spec).keep) is type(method.keep)


def test_a_file(tmp_path):
    path = tmp_path / "mine.json"
    vtp.Schedule({3: 7}).save(path)
    assert method_from_spec(str(path)) == vtp.Schedule({3: 7})


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "fast",
        "fastv:",
        "fastv:two",
        "fastv:2:0.5:9",
        "fastv:0",
        "fastv:2:1.5",
        "fastv:2:0.5:video",
        "schedule:2=4:text:frame:1",
        "random:0.2:0:0:0",
        "pyramiddrop:8",
        "pyramiddrop:4=0.5,2=0.5",
        "schedule",
        "schedule:2",
        "schedule:2=0.5,2=0.1",
        "schedule:2=0.5:best",
        "divprune:64",
        "vidcom2:frames=images",
        "chain",
        "chain:",
        "chain:fastv",
        "chain:divprune+fastv",
        "chain:divprune + fastvv",
        "chain:divprune + fastv:two",
        "chain:divprune + none",
        "chain:chain:divprune + fastv + random",
        "None",
    ],
)
def test_specs_that_mean_nothing_list_what_does(spec):
    with pytest.raises(ValueError) as error:
        method_from_spec(spec)
    assert all(name in str(error.value) for name in [*METHODS, "none", ".json"])


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere/mine\.json"):
        method_from_spec("nowhere/mine.json")


def test_chains(tmp_path):
    """Their parts are written as they are alone; a + without spaces is part of a value."""
    vtp.Schedule({3: 7}).save(tmp_path / "a+b.json")
    for spec, parts in (
        ("divprune:keep=192 + fastv:2:0.5", (vtp.DivPrune(192), vtp.FastV(2, 0.5))),
        (f"cdpruner + {tmp_path}/a+b.json", (vtp.CDPruner(), vtp.Schedule({3: 7}))),
        (
            "random:0.5 + inflection:source=none,llm_layers=2+4 + fastv:5",
            (
                vtp.RandomPruning(),
                vtp.InflectionPruning(None, llm_layers=(2, 4)),
                vtp.FastV(5),
            ),
        ),
    ):
        assert vtp.method(f"chain:{spec}") == vtp.Chain(*parts)
    with pytest.raises(ValueError) as error:
        vtp.method("chain:divprune + fastv:two")
    assert str(error.value).count("Methods are written as") == 1
    assert "method 'fastv:two': invalid literal" in str(error.value)


def test_the_public_name():
    assert vtp.method("fastv:2:0.5") == vtp.FastV(layer=2, keep=0.5)
    assert vtp.method("none") is None
    with pytest.raises(TypeError, match=r"method: expected a string such as .*, got 3$"):
        vtp.method(3)


def test_a_setting_that_is_given_twice():
    with pytest.raises(ValueError, match="min_keep is set twice in 'min_keep=1,min_keep=2'"):
        vtp.method("visipruner:min_keep=1,min_keep=2")


# --- wherever there has to be a method ----------------------------------------------------------


def test_a_method_or_its_string():
    method = vtp.FastV(2, 0.5)
    assert method_of(method) is method and method_of("fastv:2:0.5") == method


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("none", ValueError, '"none" is the model as it is, there is nothing to apply'),
        ("fastvv", ValueError, "there is no method 'fastvv'"),
        (vtp.FastV, TypeError, r"got the class FastV; make one of it: FastV\(\.\.\.\)"),
        (None, TypeError, "expected a Method, or a string .* got None"),
        ({"method": "fastv"}, TypeError, "got {'method': 'fastv'}"),
        (torch.nn.Linear(2, 2), TypeError, "got a Linear$"),
    ],
)
def test_what_is_no_method(given, error, message):
    with pytest.raises(error, match=message):
        method_of(given)


# --- methods of one's own -----------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
from pathlib import Path
import vtp_kernels as vtp

Path({mark!r}).touch()

@dataclass(frozen=True)
class Last(vtp.Method, key={key!r}):
    layer: int = 1
    keep: int | float = 2
    words: tuple = ()

    def decision_layers(self, depth):
        return (self.layer,)

    def decide(self, layer, rows):
        counts = [min(self.keep, n) for n in rows.visual_now]
        return rows.keep_visual(counts, rows.visual_ordinal.float())

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch, methods):
    """A module with a method: its name, the method's key, and a file that is there once it ran."""
    name = f"own_{tmp_path.name}"
    folder = tmp_path / "package"
    folder.mkdir()
    mark = tmp_path / "ran"
    (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text(OWN.format(mark=str(mark), key=name))
    (folder / "broken.py").write_text("1 / 0")
    (folder / "lacking.py").write_text("import surely_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    yield f"package.{name}", name, mark
    for module in [m for m in sys.modules if m.partition(".")[0] == "package"]:
        del sys.modules[module]


def test_a_method_of_one_s_own_by_its_module(own):
    module, key, mark = own
    method = vtp.method(f"{module}:Last")
    assert mark.exists() and method.to_dict() == {
        "method": key,
        "module": module,
        "layer": 1,
        "keep": 2,
        "words": [],
    }
    made = vtp.method(f"{module}:Last:keep=0.5,layer=3,words=a+2")
    assert made == type(method)(layer=3, keep=0.5, words=("a", 2))
    assert vtp.method(f"{key}:keep=4") == type(method)(keep=4)  # its key will do from now on


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}:Lost", "has no method Lost: that is nothing"),
        ("{}:number", "has no method number: that is 3"),
        ("{}:Path", "has no method Path: that is the class Path"),
        ("{}:Last:", "expected FIELD=VALUE with one of"),
        ("{}:Last:kept=3", r"one of \['keep', 'layer', 'words'\], got 'kept=3'"),
        ("package.nowhere:Last", "no method 'package.nowhere', and no module of that name"),
        ("fastvv:two", "there is no method 'fastvv', and no module of that name"),
        ("package.broken:Last", "broken cannot be imported: ZeroDivisionError: division by zero"),
        ("package.lacking:Last", "cannot be imported: No module named 'surely_not_installed'"),
    ],
)
def test_what_cannot_be_had_from_a_module(own, spec, message):
    with pytest.raises(ValueError, match=message):
        vtp.method(spec.format(own[0]))


def test_a_name_that_is_taken_is_never_a_module(own, tmp_path):
    """`random` is a module of Python, too."""
    assert vtp.method("random:0.22") == vtp.RandomPruning(keep=0.22)
    with pytest.raises(ValueError, match="method 'random:Random'"):
        vtp.method("random:Random")


def test_a_file_makes_nothing_be_imported(own, tmp_path):
    module, key, mark = own
    for values in (
        {"method": key, "module": module, "keep": 3},
        {"method": f"{module}:Last", "keep": 3},
    ):
        (tmp_path / "it.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"it\.json: .* import the module '{module}'"):
            vtp.method(str(tmp_path / "it.json"))
    assert not mark.exists() and module not in sys.modules


def test_a_file_is_read_once_the_module_is_there(own, tmp_path):
    module, key, _ = own
    (tmp_path / "it.json").write_text(json.dumps({"method": key, "module": module, "keep": 3}))
    found = importlib.import_module(module).Last
    assert vtp.method(str(tmp_path / "it.json")) == found(keep=3)
    for method in (found(keep=5), found(words=("a", "b"))):
        method.save(tmp_path / "it.json")
        assert vtp.Method.load(tmp_path / "it.json") == method


def test_a_file_from_a_notebook_says_so():
    with pytest.raises(ValueError, match="no method 'mine' yet: run the script or cell"):
        vtp.Method.from_dict({"method": "mine", "module": "__main__"})
