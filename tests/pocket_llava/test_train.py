"""The training script: packed questions look as they do when asked alone, and a short run works."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlavaForConditionalGeneration

from vtp_kernels.demo import load
from vtp_kernels.pocket_llava import scenes, train
from vtp_kernels.pocket_llava.model import TOKEN, config, new_model, pixels


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
        shown = train.drawn(picture, np.random.default_rng(0))[:count]
        touched = np.flatnonzero(picture.coverage.max(0).ravel() > 0.05)
        assert len(set(shown)) == count and set(touched) <= set(shown)


def test_few_patches_are_drawn_from_all_objects(pictures):
    for picture in pictures:
        left = train.drawn(picture, np.random.default_rng(0))[: 3 * len(picture.things)]
        for cover in picture.coverage:
            assert (cover.ravel()[left] > 0.05).any()


def test_packed_patches_leave_as_if_they_were_removed(pictures):
    """Against a loop over layers in which the rows of patches that left are cut out."""
    torch.manual_seed(0)
    model = new_model().eval()
    counts = (40, 40, 18, 9)
    packed = train.pack(pictures[:1], np.random.default_rng(0), 2, counts)
    image = pixels([pictures[0].image])
    with torch.no_grad():
        logits, hidden, _ = train.forward(model, image, packed)

        language = model.model.language_model
        rows = model.get_input_embeddings()(packed["ids"])
        visual = model.model.multi_modal_projector(hidden[:, 1:][:, packed["patches"][0]])
        rows = torch.cat([rows[:, :1], visual, rows[:, 1 + counts[0] :]], 1)
        patch = torch.full((rows.shape[1],), -1)  # -1: text
        patch[1 : 1 + counts[0]] = packed["patches"][0]
        here = torch.arange(rows.shape[1])
        order = torch.from_numpy(train.drawn(pictures[0], np.random.default_rng(0)))
        for index, layer in enumerate(language.layers):
            left = order[: counts[min(index, len(counts) - 1)]]
            stays = (patch[here] == -1) | torch.isin(patch[here], left)
            rows, here = rows[:, stays], here[stays]
            rows = layer(
                rows,
                attention_mask=packed["mask"][:, :1, here][..., here],
                position_embeddings=language.rotary_emb(rows, packed["positions"][:, here]),
            )
        expected = model.lm_head(language.norm(rows))
    assert (patch[here] >= 0).sum() == counts[-1]
    assert (packed["patches"].diff() > 0).all()
    torch.testing.assert_close(logits[:, here], expected, rtol=1e-4, atol=1e-4)


def test_counts_of_the_last_stage_fall_from_layer_to_layer():
    draws = [train.fewer_counts(np.random.default_rng(seed), 8) for seed in range(200)]
    for counts in draws:
        assert len(counts) == 8 and list(counts) == sorted(counts, reverse=True)
        assert train.FEWEST_SHOWN <= counts[0] <= train.PATCHES
        assert counts[-1] >= train.FEWEST_LEFT
    assert {counts.index(counts[-1]) for counts in draws} >= {2, 3, 4, 5, 6, 7}


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


@pytest.fixture
def small(monkeypatch):
    """What the script trains has half the layers, and is checked on four pictures."""
    half = config()
    half.text_config.num_hidden_layers = 4
    monkeypatch.setattr(train, "new_model", lambda: LlavaForConditionalGeneration(half))
    monkeypatch.setattr(train, "accuracy", partial(train.accuracy, pictures=4, questions=2))


@pytest.mark.usefixtures("small")
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
    checked = [tuple(line["patches"]) for line in lines if "accuracy" in line]
    assert checked == list(train.FEWER_CHECKS)
    after = load(tmp_path, device="cpu")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def logged(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
