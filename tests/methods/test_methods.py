"""Methods: what is refused when they are made, what survives a file, how many tokens stay."""

import json
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

import vtp_kernels as vtp
from vtp_kernels.methods import METHODS, Method, load_method
from vtp_kernels.methods.budget import visual_budget

EVERY = [
    vtp.FastV(),
    vtp.FastV(layer=3, keep=64),
    vtp.PyramidDrop(),
    vtp.PyramidDrop(layers=(1, 2), keep=(0.5, 0)),
    vtp.RandomPruning(),
    vtp.RandomPruning(layer=2, keep=1.0, seed=-7),
    vtp.Schedule({}),
    vtp.Schedule({2: 0.5, 4: 16}, score="text"),
    vtp.Schedule({0: 1}, score="random", seed=3),
    vtp.VisionZip(0.2, contextual=4, per="picture"),
    vtp.VisPruner(32, important=0.25),
    vtp.HiPrune(middle=-2, per="frame"),
    vtp.DART(layer=3, keep=0.2, visual_pivots=2),
    vtp.SparseVLM(),
    vtp.SparseVLM((2,), (64,), recycle=False),
    vtp.DivPrune(),
    vtp.DivPrune(0.1, per="frame"),
    vtp.CDPruner(32, per="image"),
    vtp.FrameDifference(0.5, frames="pictures"),
    vtp.VidCom2(),
    vtp.Chain(vtp.DivPrune(192), vtp.PyramidDrop((2, 4), (0.5, 0))),
    vtp.Chain(vtp.FrameDifference(), vtp.Schedule({3: 4}), vtp.FastV(8)),
]


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_survives_a_file(method, tmp_path):
    method.save(tmp_path / "method.json")
    assert load_method(tmp_path / "method.json") == method
    assert type(method).load(tmp_path / "method.json") == method
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_a_file_says_count_and_share_apart(tmp_path):
    for keep in (1, 1.0):
        vtp.FastV(2, keep).save(tmp_path / "method.json")
        assert type(load_method(tmp_path / "method.json").keep) is type(keep)


def test_to_dict_is_plain():
    assert vtp.Schedule({4: 0.1, 2: 0.5}).to_dict() == {
        "method": "schedule",
        "keep": {"2": 0.5, "4": 0.1},
        "score": "last_token",
        "seed": 0,
        "per": "prompt",
    }
    assert vtp.PyramidDrop().to_dict() == {
        "method": "pyramiddrop",
        "layers": [8, 16, 24],
        "keep": [0.5, 0.25, 0.125],
        "per": "prompt",
    }


def test_image_is_another_word_for_picture():
    for method in (
        vtp.FastV(per="image"),
        vtp.Schedule({2: 1}, per="image"),
        vtp.DivPrune(8, "image"),
    ):
        assert method.per == "picture" and method.to_dict()["per"] == "picture"
    assert vtp.FastV(per="image") == vtp.FastV(per="picture")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, '"method"'),
        ([], '"method"'),
        ({"method": ["fastv"]}, '"method"'),
        ({"method": "schedule"}, r"Schedule needs \['keep'\]"),
        ({"method": "fastvv"}, r"no method 'fastvv'.*'fastv', .*'pyramiddrop', 'random'"),
        (
            {"method": "fastv", "ratio": 0.5},
            r"FastV has no \['ratio'\]; it has \['keep', 'layer', 'per'\]",
        ),
    ],
)
def test_descriptions_that_make_no_method(values, message):
    with pytest.raises(ValueError, match=message):
        Method.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON that can be read: Expecting value"),
        ('{"method": "fastv"', "is no JSON that can be read: Expecting"),
        ("[" * 100_000, "is no JSON that can be read"),
        ('{"method": "fastv", "keep": 1, "keep": 2}', r"has the keys \['keep'\] twice"),
        ("[1]", r': a method description needs the key "method".* got \[1\]'),
        ('"fastv"', ": a method description needs the key"),
        ('{"method": "fastv", "layer": "2"}', r": FastV\.layer: a layer is an int, got '2'"),
        ('{"method": "fastv", "keep": NaN}', r": FastV\.keep"),
        ('{"method": "pyramiddrop", "layers": 8}', r": PyramidDrop\.layers: expected layers"),
        ('{"method": "visipruner", "decision": "fixed", "schedule": {"keep": 1}}', "needs the key"),
        ('{"method": "chain"}', r"Chain needs \['parts'\]"),
        ('{"method": "chain", "parts": 2}', r"Chain\.parts: expected a list of methods, got 2"),
        ('{"method": "chain", "parts": [{"method": "fastv"}]}', "expected two methods or more"),
        ('{"method": "chain", "parts": [{"method": "fastv"}, {"keep": 1}]}', "needs the key"),
    ],
)
def test_a_file_that_holds_no_method_is_named(tmp_path, text, message):
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(ValueError, match=rf"it\.json.*{message}"):
        load_method(tmp_path / "it.json")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "it.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"it\.json is no JSON that can be read: 'utf-8' codec"):
        load_method(tmp_path / "it.json")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_method(tmp_path)


def test_from_dict_of_another_method():
    with pytest.raises(ValueError, match=r"FastV expects .*'fastv', got 'random'"):
        vtp.FastV.from_dict(vtp.RandomPruning().to_dict())


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        vtp.FastV().layer = 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vtp.FastV(layer=-1), ValueError, r"FastV\.layer: .* -1"),
        (lambda: vtp.FastV(layer=1.0), TypeError, r"FastV\.layer: a layer is an int, got 1\.0"),
        (lambda: vtp.FastV(layer=True), TypeError, r"FastV\.layer"),
        (lambda: vtp.FastV(layer=0), ValueError, r"FastV\.layer: .*none before layer 0"),
        (lambda: vtp.FastV(keep=1.5), ValueError, r"FastV\.keep: .*0\.0 and 1\.0, got 1\.5"),
        (lambda: vtp.FastV(keep=-1), ValueError, r"FastV\.keep: cannot keep -1"),
        (lambda: vtp.FastV(keep=float("nan")), ValueError, r"FastV\.keep"),
        (lambda: vtp.FastV(keep="half"), TypeError, r"FastV\.keep: .*'half'"),
        (lambda: vtp.FastV(keep=True), TypeError, r"FastV\.keep"),
        (lambda: vtp.RandomPruning(keep=2.0), ValueError, r"RandomPruning\.keep"),
        (lambda: vtp.RandomPruning(seed=0.5), TypeError, r"RandomPruning\.seed"),
        (lambda: vtp.PyramidDrop((1, 2), (0.5,)), ValueError, "2 layers .* 1 values"),
        (lambda: vtp.PyramidDrop((4, 2), (0.5, 0.2)), ValueError, "2 comes after 4"),
        (lambda: vtp.PyramidDrop((2, 2), (0.5, 0.2)), ValueError, "2 comes after 2"),
        (lambda: vtp.PyramidDrop((2, 4), (0.2, 0.5)), ValueError, "do not come back"),
        (
            lambda: vtp.PyramidDrop(8, 0.5),
            TypeError,
            r"PyramidDrop\.layers: expected layers, .* got 8",
        ),
        (
            lambda: vtp.PyramidDrop((8,), 0.5),
            TypeError,
            r"PyramidDrop\.keep: expected one for each",
        ),
        (lambda: vtp.FastV(torch.nn.Linear(2, 2)), TypeError, "a layer is an int, got a Linear$"),
        (lambda: vtp.FastV(keep=torch.ones(2, 2)), TypeError, r"got a tensor \[2, 2\] of float32$"),
        (lambda: vtp.Schedule([2, 0.5]), TypeError, r"Schedule\.keep"),
        (lambda: vtp.Schedule({"two": 0.5}), TypeError, r"Schedule\.keep.*'two'"),
        (lambda: vtp.Schedule({"2": 0.5, 2: 0.1}), ValueError, "named twice"),
        (lambda: vtp.Schedule({2: None}), TypeError, r"Schedule\.keep\[2\]"),
        (lambda: vtp.Schedule({0: 0.5}), ValueError, "none before layer 0"),
        (lambda: vtp.Schedule({0: 0.5}, score="text"), ValueError, "none before layer 0"),
        (lambda: vtp.Schedule({2: 0.5}, score="best"), ValueError, r"'best'.*last_token"),
        (lambda: vtp.Schedule({2: 16, 4: 32}), ValueError, "do not come back"),
        (lambda: vtp.DivPrune(keep=1.5), ValueError, r"DivPrune\.keep: .*got 1\.5"),
        (lambda: vtp.CDPruner(keep="64"), TypeError, r"CDPruner\.keep: .*'64'"),
        (lambda: vtp.CDPruner(per="video"), ValueError, r"CDPruner\.per: .*'frame', 'image'\]"),
    ],
)
def test_settings_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vtp.PyramidDrop(), r"PyramidDrop\.layers\[0\]: there is no layer 8, the model has 8"),
        (vtp.FastV(8), r"FastV\.layer: there is no layer 8, the model has 8 .*\(0 to 7\)"),
        (vtp.RandomPruning(9), r"RandomPruning\.layer: there is no layer 9"),
        (vtp.Schedule({2: 0.5, 11: 0.1}), r"Schedule\.keep: there is no layer 11"),
    ],
)
def test_layers_the_model_does_not_have(method, message):
    with pytest.raises(ValueError, match=message):
        method.check_model(8)
    method.check_model(32)


@pytest.mark.parametrize(
    ("keep", "tokens", "stay"),
    [
        (0.5, 576, 288),
        (0.5, 575, 288),  # halves go up
        (0.22, 576, 127),  # 126.72
        (0.29, 100, 29),  # 0.29 * 100 is 28.999... in floating point
        (0.125, 3, 0),
        (1.0, 7, 7),
        (0.0, 7, 0),
        (0, 7, 0),
        (1, 7, 1),
        (64, 7, 7),
        (0.5, 0, 0),
    ],
)
def test_how_many_stay(keep, tokens, stay):
    assert visual_budget(keep, tokens) == stay


def test_a_method_of_one_s_own():
    @dataclass(frozen=True)
    class Everything(Method, key="everything"):
        layer: int = 1

        def decision_layers(self, depth):
            return (self.layer,)

        def decide(self, layer, rows):
            return None

    try:
        assert Method.from_dict({"method": "everything", "layer": 3}) == Everything(3)
        with pytest.raises(ValueError, match=r"Everything.decision_layers: there is no layer 3"):
            Everything(3).check_model(2)
    finally:
        del METHODS["everything"]


@pytest.mark.parametrize(
    ("method", "pictures", "expected"),
    [
        (vtp.FastV(2, 0.5), [5, 4], [9, 9, 5, 5, 5]),
        (vtp.FastV(2, 0.5, per="picture"), [5, 5], [10, 10, 6, 6, 6]),
        (vtp.FastV(2, 64), [5], [5, 5, 5, 5, 5]),
        (vtp.RandomPruning(0, 0.1), [40], [4, 4, 4, 4, 4]),
        (vtp.Schedule({1: 3, 3: 0.5}), [10], [10, 3, 3, 3, 3]),
        (vtp.PyramidDrop((1, 3), (0.5, 0.25)), [], [0, 0, 0, 0, 0]),
        (vtp.LVPruning(None, (1, 3), (0.3, 0.1)), [15], [15, 4, 4, 1, 1]),
        (
            vtp.VisiPruner(decision="fixed", schedule=vtp.Schedule({1: 3})),
            [4],
            [4, 3, 3, 3, 3],
        ),
        (vtp.VisiPruner(), [4], [None] * 5),
        (vtp.InflectionPruning(), [4], [None] * 5),
    ],
)
def test_how_many_are_left_is_known_beforehand(method, pictures, expected):
    assert [method.visual_left(layer, pictures) for layer in range(5)] == expected
