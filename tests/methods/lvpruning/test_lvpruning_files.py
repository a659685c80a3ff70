"""Trained deciders on disk: they come back as they were, or what differs is named."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtp_kernels.methods.lvpruning.deciders import Deciders
from vtp_kernels.methods.lvpruning.files import Fit, load_deciders, read_fit, save_deciders

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
