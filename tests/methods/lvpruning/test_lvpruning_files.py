"""Trained deciders on disk: they come back as they were, or what differs is named."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtp_kernels.methods.lvpruning.checkpoint import load_checkpoint, save_checkpoint
from vtp_kernels.methods.lvpruning.deciders import Deciders
from vtp_kernels.methods.lvpruning.files import (
    Fit,
    check_weights,
    load_deciders,
    read_fit,
    save_deciders,
)

CONFIG = SimpleNamespace(model_type="llama", num_hidden_layers=6, hidden_size=32)
FIT = Fit.of("llava", CONFIG, (1, 3), 16)


@pytest.fixture
def folder(tmp_path):
    save_deciders(tmp_path / "it", Deciders(FIT.shape), FIT, {"seed": 3})
    return tmp_path / "it"


def test_what_was_saved_comes_back(tmp_path):
    deciders = Deciders(FIT.shape)
    save_deciders(tmp_path, deciders, FIT, {})
    again = load_deciders(tmp_path)
    assert read_fit(tmp_path) == FIT
    for name, tensor in deciders.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_half_the_bytes(tmp_path):
    deciders = Deciders(FIT.shape)
    save_deciders(tmp_path, deciders, FIT, {}, torch.float16)
    stored = load_deciders(tmp_path).state_dict()
    for name, tensor in deciders.state_dict().items():
        assert stored[name].dtype == torch.float16 and torch.equal(stored[name], tensor.half())


def test_nothing_is_pickled(folder):
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert json.loads((folder / "deciders.json").read_text())["training"] == {"seed": 3}


def test_the_model_it_is_for(folder):
    read_fit(folder).check("llava", CONFIG, "here")


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("qwen2.5-vl", {}, "here: .*: family 'llava', the model's is 'qwen2.5-vl'$"),
        ("llava", {"hidden_size": 64}, "hidden size 32, the model's is 64$"),
        ("llava", {"num_hidden_layers": 8}, "decoder layers 6, the model's is 8$"),
        ("llava", {"model_type": "qwen2"}, "text model 'llama', the model's is 'qwen2'$"),
        ("x", {"hidden_size": 8}, "family 'llava', .*'x'; hidden size 32, the model's is 8$"),
    ],
)
def test_every_difference_is_named(family, changed, message):
    config = SimpleNamespace(**vars(CONFIG) | changed)
    with pytest.raises(ValueError, match=message):
        FIT.check(family, config, "here")


def test_a_folder_without_deciders(tmp_path):
    with pytest.raises(ValueError, match=r"modules_path: .*nowhere holds no trained deciders"):
        load_deciders(tmp_path / "nowhere")


def test_weights_that_are_not_there(folder):
    (folder / "deciders.safetensors").unlink()
    with pytest.raises(ValueError, match=r"modules_path: there is no deciders\.safetensors in"):
        load_deciders(folder)


def test_weights_of_another_shape(folder):
    description = json.loads((folder / "deciders.json").read_text())
    (folder / "deciders.json").write_text(json.dumps(description | {"hidden_size": 40}))
    with pytest.raises(ValueError, match=r"q_proj\.weight is \[16, 32\], expected \[16, 40\]"):
        load_deciders(folder)


def test_weights_that_are_missing_or_unknown(folder):
    weights = load_file(folder / "deciders.safetensors")
    weights["more"] = weights.pop("layers.1.head.bias")
    save_file(weights, folder / "deciders.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.head\.bias is missing; more is unknown"):
        load_deciders(folder)


def test_a_later_format(folder):
    description = json.loads((folder / "deciders.json").read_text())
    (folder / "deciders.json").write_text(json.dumps(description | {"format": 9}))
    with pytest.raises(ValueError, match="has format 9, this version of vtp_kernels reads 1"):
        read_fit(folder)


def test_a_description_that_lacks_something(folder):
    description = json.loads((folder / "deciders.json").read_text())
    del description["depth"]
    (folder / "deciders.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="does not say 'depth'"):
        read_fit(folder)


def test_as_wide_as_the_model_by_default():
    assert Fit.of("llava", CONFIG, (1,), None).shape.width == 32
    assert dataclasses.replace(FIT, depth=7) != FIT


# --- files that are damaged ---------------------------------------------------------------------

WEIGHTS, DESCRIPTION = "deciders.safetensors", "deciders.json"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size: expected an int, got '32'"),
        ({"hidden_size": True}, "hidden_size: expected an int, got True"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        ({"width": 12}, "width: deciders have 8 heads"),
        ({"width": -8}, "width: deciders have 8 heads"),
        ({"depth": None}, "depth: expected an int, got None"),
        ({"family": 3}, "family: expected a string, got 3"),
        ({"layers": 1}, "layers: expected a list of layers, got 1"),
        ({"layers": []}, "layers: expected ascending layers"),
        ({"layers": [3, 1]}, "layers: expected ascending layers"),
        ({"layers": ["1"]}, "layers: a layer is an int, got '1'"),
        ({"layers": [1, 6]}, "layers: there is no layer 6, the model has 6"),
    ],
)
def test_a_description_that_cannot_be(folder, changed, message):
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | changed))
    with pytest.raises(ValueError, match=rf"modules_path: .*{DESCRIPTION}: {message}"):
        read_fit(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON that can be read"),
        (b'{"format": 1', "is no JSON that can be read"),
        (b"\xff\xfe", "is no JSON that can be read"),
        (b"[1]", r"expected an object, got \[1\]"),
        (b"null", "expected an object, got None"),
    ],
)
def test_a_description_that_is_none(folder, content, message):
    (folder / DESCRIPTION).write_bytes(content)
    with pytest.raises(ValueError, match=rf"modules_path: .*{DESCRIPTION}.*{message}"):
        read_fit(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: bytes(200) + raw[200:],
        lambda raw: b"x" * 500,
    ],
    ids=["empty", "five bytes", "half", "a byte short", "a byte long", "zeros", "junk"],
)
def test_weights_that_are_cut_or_no_weights(folder, damage):
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    for read in (load_deciders, lambda at: check_weights(at, FIT.shape)):
        with pytest.raises(ValueError, match=rf"modules_path: .*{WEIGHTS} is cut short or no saf"):
            read(folder)


def test_weights_of_another_dtype(folder):
    weights = load_file(folder / WEIGHTS)
    weights["layers.1.head.bias"] = weights["layers.1.head.bias"].long()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"head\.bias is I64, expected one of F64, F32, BF16, F16"):
        check_weights(folder, FIT.shape)


def test_checking_reads_no_weights(folder, monkeypatch):
    """Those of a large model take seconds, and memory."""
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: self.weight.device.type)
    before = Deciders(FIT.shape).state_dict()
    assert all(tensor.device.type == "cpu" for tensor in before.values())
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    check_weights(folder, FIT.shape)
    assert made and all(tensor.device.type == "meta" for tensor in made)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "is cut short or no checkpoint of this run"),
        (lambda raw: b"junk" * 100, "is cut short or no checkpoint of this run"),
    ],
)
def test_a_checkpoint_that_is_cut(tmp_path, damage, message):
    deciders, optimizer = trained()
    save_checkpoint(tmp_path, deciders, optimizer, 3, {"seed": 1})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"checkpoint\.safetensors {message}"):
        load_checkpoint(tmp_path, deciders, optimizer, {"seed": 1})


def test_a_checkpoint_of_other_tensors_changes_nothing(tmp_path):
    deciders, optimizer = trained()
    save_checkpoint(tmp_path, deciders, optimizer, 3, {"seed": 1})
    save_file(load_file(tmp_path / "checkpoint.safetensors"), tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of this run"):  # it says nothing of a run
        load_checkpoint(tmp_path, deciders, optimizer, {"seed": 1})
    wider = Deciders(Fit.of("llava", CONFIG, (1, 3), 24).shape)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    save_checkpoint(tmp_path, deciders, optimizer, 3, {"seed": 1})
    with pytest.raises(ValueError, match=r"is \[16, 32\], expected \[24, 32\]"):
        load_checkpoint(tmp_path, wider, torch.optim.AdamW(wider.parameters()), {"seed": 1})
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())


def trained():
    """Deciders and an optimizer that has made a step."""
    deciders = Deciders(FIT.shape)
    optimizer = torch.optim.AdamW(deciders.parameters())
    sum(parameter.sum() for parameter in deciders.parameters()).backward()
    optimizer.step()
    return deciders, optimizer
