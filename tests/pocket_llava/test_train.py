"""The training script: packed questions look as they do when asked alone, and a short run works."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from vtp_kernels.demo import load
from vtp_kernels.pocket_llava import scenes, train
from vtp_kernels.pocket_llava.model import TOKEN, new_model, pixels


@pytest.fixture(scope="module")
def pictures():
    return [scenes.scene("train", index) for index in range(2)]


def test_packed_logits_are_those_of_each_question_alone(pictures):
    """Every question of a row against the model called as users call it, on that question only."""
    torch.manual_seed(0)
    model = new_model().eval()
    packed = train.pack(pictures, np.random.default_rng(0), questions=3)
    images = pixels([picture.image for picture in pictures])
    with torch.no_grad():
        logits, _, _ = train.forward(model, images, packed)
    prefix = 1 + train.PATCHES
    for b in range(len(pictures)):
        ends = (packed["labels"][b] == TOKEN["</s>"]).nonzero().flatten().tolist()
        begin = prefix
        for end in ends:
            ids = torch.cat([packed["ids"][b, :prefix], packed["ids"][b, begin : end + 1]])[None]
            with torch.no_grad():
                alone = model(input_ids=ids, pixel_values=images[b : b + 1]).logits[0, prefix:]
            torch.testing.assert_close(logits[b, begin : end + 1], alone, rtol=1e-4, atol=1e-4)
            begin = end + 1


@pytest.mark.parametrize("count", [32, 64, 128, 256])
def test_shown_patches_hold_every_object(pictures, count):
    for picture in pictures:
        shown = train.show(picture, np.random.default_rng(0), count)
        assert len(shown) == count and shown == sorted(set(shown))
        touched = np.flatnonzero(picture.coverage.max(0).ravel() > 0.05)
        assert set(touched) <= set(shown)


def test_patch_targets_name_the_object_that_covers_the_patch(pictures):
    target = train.patch_targets(pictures)
    for b, picture in enumerate(pictures):
        for thing, cover in zip(picture.things, picture.coverage, strict=True):
            row, column = np.unravel_index(cover.argmax(), cover.shape)
            assert target["shape"][b, row, column] == thing.shape
            assert target["color"][b, row, column] == thing.color
            words = target["words"][b].view(scenes.GRID, scenes.GRID, -1)[row, column]
            true = [train.WORDS[i] for i in words.nonzero().flatten().tolist()]
            names = (scenes.SHAPES[thing.shape], scenes.COLOR_NAMES[thing.color])
            assert true == [TOKEN[w] for w in (*names, *scenes.place(thing).split())]
        assert target["shape_present"][b].sum() == len(picture.things)


def test_a_short_run_learns_and_saves_a_loadable_model(tmp_path, monkeypatch, capsys):
    sizes = "--tower-steps 26 --tower-batch 4 --steps 26 --fewer-steps 2 --batch 2 --questions 4"
    arguments = ["train", *sizes.split(), "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    lines = logged(capsys)
    tower = [line["heads"] for line in lines if line["stage"] == "tower"]
    losses = [line["loss"] for line in lines if line["stage"] == "all" and "loss" in line]
    assert tower[-1] < tower[0] and losses[-1] < losses[0]
    model, _ = load(tmp_path, device="cpu")
    assert model.config.text_config.vocab_size == len(TOKEN)

    before = model.state_dict()
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "fewer", "--fewer-lr", "1e-2"])
    train.main()
    lines = logged(capsys)
    assert {line["stage"] for line in lines} == {"fewer"}
    assert [line["patches"] for line in lines if "accuracy" in line] == [256, 128, 64, 32]
    after = load(tmp_path, device="cpu")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def logged(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
