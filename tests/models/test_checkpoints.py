"""Checkpoints on the command line: those that are not all there are refused, by name."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_llava import tiny_llava
from tiny_processors import llava

from vtp_kernels import cli, demo

QUERY = "model.language_model.layers.3.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llava(tie_word_embeddings=True).save_pretrained(folder)
    llava().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(checkpoint, tmp_path):
    """The checkpoint with `change` made to its weights."""

    def make(change):
        folder = tmp_path / "changed"
        shutil.copytree(checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def query(weights):
    """As released checkpoints name it."""
    return next(
        x for x in weights if "language" in x and x.endswith("layers.3.self_attn.q_proj.weight")
    )


def refused(path, message):
    for load in (demo.check_checkpoint, lambda path: demo.load(path, device="cpu")):
        with pytest.raises(ValueError) as error:
            load(path)
        assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_one_that_is_whole(checkpoint, recwarn):
    """Its output embedding is its input embedding, and stored once."""
    stored = load_file(checkpoint / "model.safetensors")
    assert not any("lm_head" in name for name in stored)
    model, _ = demo.load(checkpoint, device="cpu")
    demo.check_checkpoint(checkpoint)
    assert torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    assert not [warning for warning in recwarn if "model:" in str(warning.message)]


def test_missing_weights_are_named(changed):
    refused(changed(lambda weights: weights.pop(query(weights))), f"has no weights for {QUERY}; ")


def test_many_missing_weights_are_counted(changed):
    def lose(weights):
        for name in [name for name in weights if "layers.3" in name and "language" in name]:
            weights.pop(name)

    refused(changed(lose), " and 5 more; with random ones it would answer nonsense")


def test_weights_of_another_shape_are_named(changed):
    def shrink(weights):
        weights[query(weights)] = torch.zeros(3, 3)

    refused(changed(shrink), f"has weights of another shape for {QUERY}; ")


def test_weights_without_a_place_are_warned_of(changed):
    def add(weights):
        weights["model.language_model.extra.weight"] = torch.zeros(3)

    folder = changed(add)
    with pytest.warns(UserWarning, match="no place for are left out: .*extra.weight"):
        demo.load(folder, device="cpu")


def test_a_broken_file_is_one_line(changed):
    folder = changed(lambda weights: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "mps:7", "", "hpu"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match="device: ") as error:
        demo.device_of(name)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_line_says_what_is_wrong_before_it_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *given, **options: pytest.fail("loaded"))
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    good = {"--model": "none", "--image": str(tmp_path / "good.png"), "--prompt": "w5"}
    good |= {"--out": str(tmp_path / "kept.png")}
    for change, message in (
        ({"--image": str(picture)}, "cannot be read as a picture"),
        ({"--out": str(tmp_path / "no" / "kept.png")}, "--out: cannot write"),
        ({"--out": str(tmp_path / "kept.txt")}, "--out: expected a name that ends as pictures do"),
        ({"--device": "nonsense"}, "device: 'nonsense' is not there"),
        ({"--device": "cuda:99"}, "device: 'cuda:99' is not there"),
    ):
        options = [part for pair in (good | change).items() for part in pair]
        assert cli.main(["run", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vtp-kernels run: ") and message in line
    assert cli.main(["demo", "--out", str(tmp_path / "no" / "kept.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vtp-kernels demo: --out: cannot write")


def test_run_with_two_pictures(checkpoint, tmp_path, capsys):
    Image.new("RGB", (90, 40), "red").save(tmp_path / "a.png")
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "b.png")
    out = tmp_path / "kept.png"
    command = ["run", "--model", str(checkpoint), "--prompt", "w5", "--repeats", "1"]
    command += ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    command += ["--out", str(out), "--max-new-tokens", "2", "--device", "cpu", "--method"]
    assert cli.main([*command, "none"]) == 0
    assert "What was kept" not in capsys.readouterr().out and not out.exists()
    assert cli.main([*command, "fastv:2:0.5"]) == 0
    page = capsys.readouterr().out
    assert f"What was kept: {out}" in page and "32 x2, 16 x4" in page
    assert Image.open(out).height > 100
