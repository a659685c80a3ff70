"""The settings of the vLLM plugin, and that being installed changes nothing. No vLLM needed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vtp_kernels import vllm as plugin
from vtp_kernels.methods.budget import visual_budget
from vtp_kernels.vllm.budget import Budget, without_budget
from vtp_kernels.vllm.checks import check_clip, check_intern, check_siglip


def kwargs(**settings):
    return {"images_kwargs": {"vtp": settings}}


def config(tower="clip_vision_model", layer=-2, strategy="default"):
    return SimpleNamespace(
        vision_config=SimpleNamespace(model_type=tower, num_hidden_layers=6),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )


def test_settings_are_read_from_where_vllm_carries_them():
    assert Budget.of(kwargs(keep=64)) == Budget(64, "attention")
    assert Budget.of(kwargs(keep=64, score="similarity")) == Budget(64, "similarity")
    for nothing in (None, {}, {"size": 1}, {"images_kwargs": {"size": 1}}, {"images_kwargs": None}):
        assert Budget.of(nothing) is None
    assert Budget.of({"images_kwargs": {"vtp": None}}) is None
    given = kwargs(keep=0.25, at_most=1024, score="divprune")
    assert Budget.of(given) == Budget(0.25, "divprune", at_most=1024)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(64), {1: 1, 63: 63, 64: 64, 16384: 64}),
        (Budget(1.0), {1: 1, 16384: 16384}),
        (Budget(1), {1: 1, 576: 1}),
        (Budget(0.25), {4: 1, 5: 1, 6: 2, 575: 144, 16384: 4096}),
        (Budget(0.01), {4: 1, 16384: 164}),
        (Budget(0.25, at_most=1024), {4: 1, 4096: 1024, 4100: 1024, 16384: 1024}),
    ],
)
def test_rows_follow_from_the_size(budget, expected):
    assert {size: budget.rows(size) for size in expected} == expected
    rows = [budget.rows(size) for size in range(1, 2000)]
    assert rows == sorted(rows)
    if isinstance(budget.keep, float):  # as methods in transformers count
        assert rows == [
            min(max(visual_budget(budget.keep, size), 1), budget.at_most or size)
            for size in range(1, 2000)
        ]


@pytest.mark.parametrize(
    "budget",
    [Budget(64), Budget(1, "divprune"), Budget(1.0, "similarity"), Budget(0.1, at_most=16384)],
)
def test_workers_read_what_the_processor_wrote(budget):
    numbers = torch.tensor(budget.to_numbers(), dtype=torch.float64)
    found = Budget.of_numbers(numbers.tolist())
    assert found == budget and type(found.keep) is type(budget.keep)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"vtp": {"keep": 64}}, ValueError, "expected within 'images_kwargs'"),
        ({"images_kwargs": {"vtp": 64}}, TypeError, "expected a mapping"),
        (kwargs(score="attention"), ValueError, "vtp.keep: .* got nothing"),
        (kwargs(keep=64, ratio=0.5), ValueError, "there is no ratio"),
        (kwargs(keep=0), ValueError, "vtp.keep: expected at least 1 .* got 0"),
        (kwargs(keep=0.0), ValueError, "vtp.keep: .* a share above 0.0, got 0.0"),
        (kwargs(keep=-1), ValueError, "vtp.keep: cannot keep -1 tokens"),
        (kwargs(keep=1.5), ValueError, "vtp.keep: a share lies between 0.0 and 1.0, got 1.5"),
        (kwargs(keep=True), TypeError, "vtp.keep: .* got True"),
        (kwargs(keep="64"), TypeError, "vtp.keep: .* got '64'"),
        (kwargs(keep=64, score="norm"), ValueError, "vtp.score: .* got 'norm'"),
        (kwargs(keep=64, score="cdpruner"), ValueError, "all text of a prompt"),
        (kwargs(keep=64, at_most=64), ValueError, "vtp.at_most: bounds a share.*count 64"),
        (kwargs(keep=0.5, at_most=0), ValueError, "vtp.at_most: expected at least 1, got 0"),
        (kwargs(keep=0.5, at_most=9.5), TypeError, "vtp.at_most: expected an int, got 9.5"),
    ],
)
def test_bad_settings_are_named(given, error, message):
    with pytest.raises(error, match=message):
        Budget.of(given)


def test_settings_must_fit_the_model():
    Budget(256).check_most(256)
    Budget(0.5, at_most=300).check_most(256)
    with pytest.raises(ValueError, match="at most 256 tokens, got 257"):
        Budget(257).check_most(256)
    check_clip(Budget(1, "similarity"), config(layer=0))
    with pytest.raises(NotImplementedError, match="'siglip_vision_model', which has no CLS"):
        check_clip(Budget(64), config(tower="siglip_vision_model"))
    with pytest.raises(NotImplementedError, match="got 'full'"):
        check_clip(Budget(64), config(strategy="full"))
    with pytest.raises(NotImplementedError, match="one vision_feature_layer"):
        check_clip(Budget(64), config(layer=[-2, -4]))
    for layer in (0, -7):
        with pytest.raises(ValueError, match="before the first layer"):
            check_clip(Budget(64), config(layer=layer))


def test_settings_must_fit_towers_without_cls_and_those_of_tiles():
    check_siglip(Budget(64), config("siglip_vision_model", layer=-1, strategy="full"))
    for wrong, message in (
        (config(strategy="full"), "how a 'clip_vision_model' sees"),
        (config("siglip_vision_model"), "'full', got 'default'"),
        (config("siglip_vision_model", layer=[-1, -2], strategy="full"), "one vision_feature"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            check_siglip(Budget(64), wrong)
    for layer in (-1, 6):
        check_intern(Budget(64), config("internvl_vision", layer=layer))
    check_intern(Budget(64), SimpleNamespace(vision_config=config().vision_config))  # InternVLChat
    with pytest.raises(NotImplementedError, match="the only one that vLLM takes, got -2"):
        check_intern(Budget(64), config("internvl_vision"))
    with pytest.raises(NotImplementedError, match="'default', got 'full'"):
        check_intern(Budget(64), config("internvl_vision", layer=-1, strategy="full"))


def test_transformers_is_not_told():
    assert without_budget(None) == {}
    assert without_budget(kwargs(keep=1)) == {}
    given = {"images_kwargs": {"vtp": {"keep": 1}, "size": 2}, "device": "cpu"}
    assert without_budget(given) == {"images_kwargs": {"size": 2}, "device": "cpu"}
    assert given["images_kwargs"]["vtp"] == {"keep": 1}


class Registry:
    def __init__(self):
        self.models = {}

    def register_model(self, architecture, place):
        self.models[architecture] = place


@pytest.mark.parametrize(
    ("plugins", "asked"),
    [(None, False), ("", False), ("lora", False), ("vtp_kernels", True), ("a,vtp_kernels", True)],
)
def test_nothing_is_registered_unless_asked_for(monkeypatch, plugins, asked):
    registry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    plugin.register()
    assert registry.models == (plugin.MODELS if asked else {})


def test_the_entry_point_leads_to_it_and_its_places_exist():
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."vllm.general_plugins"]\n')[1]
    assert section.startswith(f'{plugin.PLUGIN} = "vtp_kernels.vllm:register"\n')
    for place in plugin.MODELS.values():
        module, name = place.split(":")
        source = (root / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert f"\nclass {name}(" in source


def test_the_entry_point_imports_neither_vllm_nor_transformers():
    code = (
        "import sys, vtp_kernels.vllm as plugin\n"
        "plugin.register()\n"
        "print(sorted({'vllm', 'transformers'} & {name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
