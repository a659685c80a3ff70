"""Methods written as short strings."""

import pytest

import vtp_kernels as vtp
from vtp_kernels.methods import METHODS, method_from_spec


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
        ("random", vtp.RandomPruning()),
        ("random:0.22", vtp.RandomPruning(layer=0, keep=0.22)),
        ("random:32:4", vtp.RandomPruning(layer=4, keep=32)),
        ("random:0.5:2:7", vtp.RandomPruning(layer=2, keep=0.5, seed=7)),
        ("pyramiddrop", vtp.PyramidDrop()),
        ("pyramiddrop:2=0.5,4=0.25", vtp.PyramidDrop((2, 4), (0.5, 0.25))),
        ("schedule:2=0.5,4=0.1", vtp.Schedule({2: 0.5, 4: 0.1})),
        ("schedule:2=64", vtp.Schedule({2: 64})),
        ("schedule:0=0.3:random", vtp.Schedule({0: 0.3}, score="random")),
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
        "random:0.2:0:0:0",
        "pyramiddrop:8",
        "pyramiddrop:4=0.5,2=0.5",
        "schedule",
        "schedule:2",
        "schedule:2=0.5,2=0.1",
        "schedule:2=0.5:best",
        "None",
    ],
)
def test_specs_that_mean_nothing_list_what_does(spec):
    with pytest.raises(ValueError) as error:
        method_from_spec(spec)
    assert all(name in str(error.value) for name in [*METHODS, "none", ".json"])


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        method_from_spec("nowhere/mine.json")
