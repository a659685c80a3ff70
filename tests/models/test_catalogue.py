"""`vtp-kernels models`: what is taken, and why all else is not."""

import json

import pytest
import torch
import transformers
from tiny_models import FAMILIES as TINY
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import vtp_kernels as vtp
from vtp_kernels.catalogue import catalogue
from vtp_kernels.cli import main
from vtp_kernels.models.families import FAMILIES
from vtp_kernels.models.families.refused import NOT_LOOKED_AT, REFUSED

TAKEN = {name for page in FAMILIES.values() for name in page.architectures}
LOOKED_AT = (5, 23)  # of later versions, models may be "not looked at yet"


def test_every_model_that_reads_pictures_is_taken_or_has_a_reason():
    missing = [
        kind
        for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if name not in TAKEN and kind not in REFUSED
    ]
    if tuple(map(int, transformers.__version__.split(".")[:2])) <= LOOKED_AT:
        assert not missing, f"has neither a page nor a reason in refused.py: {missing}"
    assert all(catalogue().refused[kind] == NOT_LOOKED_AT for kind in missing)


def test_what_has_a_page_is_not_refused():
    stale = [
        kind
        for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if name in TAKEN and kind in REFUSED
    ]
    assert not stale, f"has a page now, and is to be taken out of refused.py: {stale}"


def test_the_table_says_what_pages_say(capsys):
    assert main(["models"]) == 0
    page = capsys.readouterr().out
    for name, family in vtp.supported_models().items():
        assert f"\n{name} " in page and family["example"] in page
    examples = [x["example"] for x in vtp.supported_models().values() if x["example"]]
    assert len(set(examples)) == len(examples)  # none is of another page
    for reason in set(catalogue().refused.values()):
        assert f"\n{reason}\n    " in page
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["families"]["llava"]["vllm"] == ["budget", "stages", "encode"]
    assert found["families"]["internvl"]["vllm"] == ["budget", "stages"]
    assert found["families"]["paligemma"]["vllm"] == []
    assert found["families"].keys() == vtp.supported_models().keys()
    assert found["refused"]["mllama"].startswith("an encoder reads the picture")


def test_what_this_transformers_lacks_is_said(monkeypatch, capsys):
    newer = "LlavaOfTomorrowForConditionalGeneration"
    architectures = (*FAMILIES["llava"].architectures, newer)
    monkeypatch.setattr(type(FAMILIES["llava"]), "architectures", architectures)
    assert newer not in vtp.supported_models()["llava"]["available"]
    main(["models"])
    assert f"{newer} (not in this transformers)" in " ".join(capsys.readouterr().out.split())


class MllamaForConditionalGeneration(torch.nn.Module):
    pass


class TomorrowForConditionalGeneration(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    "kind, reason",
    [
        (MllamaForConditionalGeneration, ": an encoder reads the picture, "),
        (TomorrowForConditionalGeneration, ": not looked at yet."),
        (torch.nn.Linear, "."),
    ],
)
def test_errors_are_two_lines(kind, reason, monkeypatch):
    monkeypatch.setitem(
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "tomorrow", "TomorrowForConditionalGeneration"
    )
    model = kind(1, 1) if kind is torch.nn.Linear else kind()
    with pytest.raises(NotImplementedError) as refusal:
        vtp.apply(model, vtp.FastV())
    first, second = str(refusal.value).splitlines()
    assert first.startswith(f"{kind.__name__} is not supported{reason}")
    assert second == "`python -m vtp_kernels models` lists the models that are."


def test_families_that_are_too_new_for_this_transformers(monkeypatch):
    monkeypatch.setattr(type(FAMILIES["qwen2_5_vl"]), "since", "99.1")
    with pytest.raises(NotImplementedError, match=r"taken from transformers 99\.1 on, and") as late:
        vtp.apply(TINY["qwen2_5_vl"].make(), vtp.FastV())
    assert len(str(late.value).splitlines()) == 2


def test_text_models_are_refused_in_two_lines():
    model = TINY["qwen2_5_vl"].make()
    model.get_decoder().layers[1].self_attn.is_causal = False
    with pytest.raises(NotImplementedError) as refusal:
        vtp.apply(model, vtp.FastV())
    first, second = str(refusal.value).splitlines()
    assert first.startswith("a 'qwen2_5_vl_text' text model is not supported: the attention of ")
    assert "vtp_kernels models" in second
