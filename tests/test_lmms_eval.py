"""lmms-eval finds pruned models by the entry point, and what cannot be pruned is no empty answer.

Where lmms-eval is not installed, stand-ins with its interface take the place of its classes.
"""

import importlib
import importlib.util
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

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class LlavaHf:
    """As much of lmms-eval's class as a pruned one relies on: it takes its settings by name, has
    `model`, and answers with nothing whenever generate() raises."""

    is_simple = True

    def __init__(self, pretrained, device="cpu", **unexpected):
        assert unexpected == {}, f"Unexpected kwargs: {unexpected}"
        self.model = LlavaForConditionalGeneration.from_pretrained(pretrained).to(device)
        self.processor = processor()

    def generate_until(self, requests):
        answers = []
        for image, question, settings in requests:
            inputs = chat_inputs(self.processor, [image], [question])
            try:
                ids = self.model.generate(**inputs, do_sample=False, **settings)
                ids = ids[:, inputs["input_ids"].shape[1] :]
            except Exception:
                ids = [[]]
            answers.append(self.processor.tokenizer.decode(ids[0], skip_special_tokens=True))
        return answers


class ChatLlavaHf(LlavaHf):
    is_simple = False


@pytest.fixture
def stand_ins(monkeypatch):
    contents = {
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.simple.llava_hf": {"LlavaHf": LlavaHf},
        "lmms_eval.models.chat.llava_hf": {"LlavaHf": ChatLlavaHf},
    }
    for path, content in contents.items():
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            name = ".".join(names[:depth])
            if name not in sys.modules or not hasattr(sys.modules[name], "a_stand_in"):
                module = types.ModuleType(name)
                module.a_stand_in = True
                monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[path]).update(content)
    for name in ("simple", "chat"):
        monkeypatch.delitem(sys.modules, f"vtp_kernels.lmms_eval.{name}", raising=False)
    yield
    for name in ("simple", "chat"):
        sys.modules.pop(f"vtp_kernels.lmms_eval.{name}", None)


def class_at(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def manifest():
    """What the entry point in pyproject.toml leads to."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(
        r'\[project\.entry-points\."lmms_eval\.models"\]\n(\w+) = "([\w.:]+)"', text
    )
    module, function = section[2].split(":")
    found = getattr(importlib.import_module(module), function)()
    assert found.model_id == section[1] == "llava_hf_vtp"
    return found


def requests(count):
    cases = list(scenes.cases("test", count))
    asked = [
        (Image.fromarray(case.scene.image), case.question.text, {"max_new_tokens": 4})
        for case in cases
    ]
    return asked, [case.question.answer for case in cases]


def test_the_entry_point_leads_to_both_kinds_of_model(stand_ins):
    found = manifest()
    simple, chat = class_at(found.simple_class_path), class_at(found.chat_class_path)
    assert issubclass(simple, LlavaHf) and simple.is_simple
    assert issubclass(chat, ChatLlavaHf) and not chat.is_simple


def test_models_are_pruned(stand_ins, tmp_path):
    cls = class_at(manifest().simple_class_path)
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
    nothing = cls(pretrained=str(TRAINED), vtp="random:0.0")
    assert nothing.generate_until(asked) != right


def test_what_is_refused_is_no_empty_answer(stand_ins):
    model = class_at(manifest().simple_class_path)(pretrained=str(TRAINED), vtp="fastv:2:0.5")
    asked, _ = requests(2)
    asked = [(*request[:2], request[2] | {"prefill_chunk_size": 8}) for request in asked]
    assert LlavaHf.generate_until(model, asked) == ["", ""]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate_until(asked)
    assert "generate" not in vars(model.model)


def test_a_method_is_asked_for_before_the_model_is_loaded(stand_ins):
    cls = class_at(manifest().simple_class_path)
    with pytest.raises(ValueError, match="there is no method 'fastw'"):
        cls(pretrained="nowhere", vtp="fastw:2")
    with pytest.raises(TypeError, match="vtp"):
        cls(pretrained="nowhere")


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_lmms_eval_takes_the_manifest():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("llava_hf_vtp").__name__ == "PrunedLlavaHf"
    assert registry.get_model_class("llava_hf_vtp", force_simple=True).is_simple
