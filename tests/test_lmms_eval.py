"""lmms-eval finds pruned models by the entry point, and what cannot be pruned is no empty answer.

Where lmms-eval is not installed, stand-ins with its interface take the place of its classes.
"""

import importlib
import importlib.util
import os
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

import vtp_kernels as vtp
from vtp_kernels.chat import chat_inputs
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED, processor
from vtp_kernels.vllm import Budget

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Model:
    """As much of a class of lmms-eval as a pruned one relies on: it takes its settings by name, has
    `model`, and answers with nothing whenever generate() raises."""

    is_simple = True

    def __init__(self, pretrained, device="cpu", batch_size=1, **unexpected):
        assert unexpected == {}, f"Unexpected kwargs: {unexpected}"
        self.model = LlavaForConditionalGeneration.from_pretrained(pretrained).to(device)
        self.processor, self.batch_size = processor(), batch_size

    def generate_until(self, requests):
        answers = []
        for start in range(0, len(requests), self.batch_size):
            images, questions, settings = zip(
                *requests[start : start + self.batch_size], strict=True
            )
            inputs = chat_inputs(self.processor, images, questions)
            try:
                ids = self.model.generate(**inputs, do_sample=False, **settings[0])
                ids = ids[:, inputs["input_ids"].shape[1] :]
            except Exception:
                ids = [[]] * len(images)
            answers += self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return answers


class Engine:
    """Its class for vLLM, which hands on what it does not know."""

    is_simple = True

    def __init__(self, model="", **settings):
        self.settings = settings
        self.plugins = os.environ["VLLM_PLUGINS"]


class ChatModel(Model):
    is_simple = False


class ChatEngine(Engine):
    is_simple = False


MODELS = {  # lmms-eval's names, and those of its classes
    "llava_hf": "LlavaHf",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3_VL",
    "internvl_hf": "InternVLHf",
    "vllm": "VLLM",
}


@pytest.fixture
def stand_ins(monkeypatch):
    contents = {"lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest}}
    for model, name in MODELS.items():
        simple, chat = (Engine, ChatEngine) if model == "vllm" else (Model, ChatModel)
        contents[f"lmms_eval.models.chat.{model}"] = {name: chat}
        if model != "internvl_hf":
            contents[f"lmms_eval.models.simple.{model}"] = {name: simple}
    for path, content in contents.items():
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            name = ".".join(names[:depth])
            if name not in sys.modules or not hasattr(sys.modules[name], "a_stand_in"):
                module = types.ModuleType(name)
                module.a_stand_in = True
                monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[path]).update(content)
    monkeypatch.delitem(sys.modules, "vtp_kernels.lmms_eval.models", raising=False)
    yield
    sys.modules.pop("vtp_kernels.lmms_eval.models", None)


def class_at(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def manifests():
    """What the entry point in pyproject.toml leads to, by name."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(
        r'\[project\.entry-points\."lmms_eval\.models"\]\n\w+ = "([\w.:]+)"\n\n', text
    )
    module, function = section[1].split(":")
    found = getattr(importlib.import_module(module), function)()
    return {manifest.model_id: manifest for manifest in found}


def simple_class(name="llava_hf_vtp"):
    return class_at(manifests()[name].simple_class_path)


def requests(count):
    cases = list(scenes.cases("test", count))
    asked = [
        (Image.fromarray(case.scene.image), case.question.text, {"max_new_tokens": 4})
        for case in cases
    ]
    return asked, [case.question.answer for case in cases]


def test_the_entry_point_leads_to_all_models_and_both_kinds_of_each(stand_ins):
    found = manifests()
    assert list(found) == [f"{name}_vtp" for name in MODELS]
    assert found["llava_hf_vtp"].aliases == ("llava_onevision_vtp",)
    for name, manifest in found.items():
        simple, chat = (Engine, ChatEngine) if name == "vllm_vtp" else (Model, ChatModel)
        made = class_at(manifest.chat_class_path)
        assert issubclass(made, chat) and not made.is_simple
        assert class_at(manifest.chat_class_path) is made
        if name == "internvl_hf_vtp":
            assert manifest.simple_class_path is None
        else:
            made = class_at(manifest.simple_class_path)
            assert issubclass(made, simple) and made.is_simple


def test_models_are_pruned(stand_ins, tmp_path):
    cls = simple_class()
    path = tmp_path / "method.json"
    vtp.FastV(2, 0.22).save(path)
    asked, right = requests(10)
    dense = cls(pretrained=str(TRAINED), vtp="none")
    assert dense.vtp is None
    assert dense.generate_until(asked) == right
    pruned = cls(pretrained=str(TRAINED), vtp=str(path))
    answers = pruned.generate_until(asked)
    assert sum(a == b for a, b in zip(answers, right, strict=True)) >= 8
    assert pruned.vtp.report().method == vtp.FastV(2, 0.22).to_dict()
    pruned.batch_size = 4
    assert pruned.generate_until(asked) == answers
    nothing = cls(pretrained=str(TRAINED), vtp="random:0.0")
    assert nothing.generate_until(asked) != right


def test_what_is_refused_is_no_empty_answer(stand_ins):
    model = simple_class()(pretrained=str(TRAINED), vtp="fastv:2:0.5")
    asked, _ = requests(2)
    asked = [(*request[:2], request[2] | {"prefill_chunk_size": 8}) for request in asked]
    assert Model.generate_until(model, asked) == ["", ""]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate_until(asked)
    assert "generate" not in vars(model.model)


def test_a_method_is_asked_for_before_the_model_is_loaded(stand_ins):
    cls = simple_class()
    with pytest.raises(ValueError, match="there is no method 'fastw'"):
        cls(pretrained="nowhere", vtp="fastw:2")
    with pytest.raises(TypeError, match="vtp"):
        cls(pretrained="nowhere")


def test_a_served_model_is_told_what_leaves(stand_ins, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    cls = simple_class("vllm_vtp")
    before = {"images_kwargs": {"vtp": Budget(144, "similarity").to_dict()}}
    share = {"images_kwargs": {"vtp": Budget(0.25, at_most=9).to_dict()}}
    assert cls("model", keep=0.25, at_most=9).settings == {"mm_processor_kwargs": share}
    made = cls("model", keep=144, score="similarity", dtype="float32")
    assert made.settings == {"mm_processor_kwargs": before, "dtype": "float32"}
    assert made.plugins == "other,vtp_kernels"
    more = {"max_num_seqs": 8, "additional_config": '{"more": 1}'}
    given = {"compilation_config": {"cudagraph_mode": "NONE"}}
    made = cls("model", vtp="fastv:2:0.5", keep=144, score="similarity", **more, **given)
    assert made.plugins == "other,vtp_kernels"
    assert made.settings == given | {
        "mm_processor_kwargs": before,
        "additional_config": {"more": 1, "vtp": {"method": vtp.FastV(2, 0.5).to_dict()}},
        "scheduler_cls": "vtp_kernels.vllm.StagedScheduler",
        "logits_processors": ["vtp_kernels.vllm:StagedRequests"],
        "enable_chunked_prefill": False,
        "max_num_seqs": 8,
    }
    between = cls("model", vtp="fastv:2:0.5").settings
    assert between["compilation_config"] == {"cudagraph_mode": "FULL_DECODE_ONLY"}
    assert cls("model", vtp="none").settings == {}


def test_what_a_served_model_is_told_wrong(stand_ins):
    cls = simple_class("vllm_vtp")
    for error, message, settings in (
        (TypeError, "vtp: expected a method, or keep=TOKENS", {}),
        (TypeError, "score: expected with keep=TOKENS", {"vtp": "none", "score": "attention"}),
        (ValueError, "there is no method 'fastw'", {"vtp": "fastw:2"}),
        (ValueError, r"vtp\.keep", {"keep": 0}),
        (ValueError, r"vtp\.score", {"keep": 8, "score": "none"}),
        (
            ValueError,
            "additional_config: vtp is",
            {"vtp": "fastv", "additional_config": {"vtp": 1}},
        ),
        (TypeError, "additional_config: .* got 3", {"vtp": "fastv", "additional_config": 3}),
        (TypeError, "additional_config: .* got '{'", {"vtp": "fastv", "additional_config": "{"}),
    ):
        with pytest.raises(error, match=message):
            cls("model", **settings)


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_lmms_eval_takes_the_manifests():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in manifests().values():
        registry.register_manifest(manifest)
        made = registry.get_model_class(manifest.model_id)
        assert not made.is_simple
    assert registry.resolve("llava_onevision_vtp").model_id == "llava_hf_vtp"
    assert registry.get_model_class("llava_hf_vtp", force_simple=True).is_simple
