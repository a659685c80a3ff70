"""MiniCPM-V and MiniCPM-OCR: pictures and frames that come as a whole and in slices, by the words
around them, through the family's own image processor and the text that its processor writes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_grids import PLAIN, SIZES, check_view, gradient
from tiny_llava import IMAGE
from tiny_models import ALL, VIDEO
from torch import nn
from transformers import MiniCPMV4_6Processor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)

import vtp_kernels as vtp
from vtp_kernels.models.pictures.grids import picture_grids

NAMES = [name for name in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr") if name in ALL]
PROCESSOR = MiniCPMV4_6ImageProcessorPil(patch_size=4, scale_resolution=64, **PLAIN)
IDS = {"<": 96, ">": 97, "[": 94, "]": 95, "\n": 93, "i": IMAGE, "v": VIDEO}
WRITER = SimpleNamespace(
    image_start_token="<",
    image_end_token=">",
    slice_start_token="[",
    slice_end_token="]",
    image_token="i",
    video_token="v",
    slice_mode=True,
    video_slice_mode=True,
)


class Colours(nn.Module):
    """A vision tower that sees the mean colour of each patch, and of the model's own windows."""

    def __init__(self, tower):
        super().__init__()
        self.dtype, self.merger = torch.float32, tower.vit_merger

    def forward(self, pixel_values, target_sizes, use_vit_merger):
        seen = pixel_values.unflatten(-1, (-1, 4)).mean((2, 4)).transpose(1, 2)
        if use_vit_merger:
            window, _, size = self.merger.get_window_index(target_sizes)
            seen = seen[:, window].unflatten(1, (-1, size)).mean(2)
        return BaseModelOutputWithPooling(last_hidden_state=seen)


class Mean(nn.Module):
    def forward(self, given):
        return given.view(len(given), -1, 3).mean(1)


def colours(name, pictures):
    """[N, 3]: what the model's visual tokens show."""
    base = ALL[name].model("sdpa").model
    base.vision_tower = Colours(base.vision_tower)
    base.merger.mlp = nn.ModuleList([Mean()])
    return torch.cat(base.get_image_features(**pictures, return_dict=True).pooler_output)


def processed(images, divisor=16, **more):
    """What the model is given of pictures, and their texts."""
    made = PROCESSOR(images, return_tensors="pt", **more)
    texts = [
        MiniCPMV4_6Processor.replace_image_token(
            WRITER, made, image_idx=i, image_token_divisor=divisor
        )
        for i in range(len(images))
    ]
    return {k: made[k] for k in ("pixel_values", "target_sizes")}, texts, made


def prompts(*rows):
    """Left-padded ids of rows of texts, with two words before and between them."""
    rows = [[1, 5, *(t for text in row for t in (*map(IDS.get, text), 7, 8))] for row in rows]
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def check(grids, seen, ids, token, blues=None):
    """Every grid's views show their parts; together they show every token once."""
    for number, grid in enumerate(grids):
        tokens, seen = seen[: len(grid.columns)], seen[len(grid.columns) :]
        assert (ids[grid.prompt, grid.columns] == token).all()
        used = torch.cat([view.tokens.flatten() for view in grid.views])
        assert sorted(used.tolist()) == list(range(len(grid.columns)))
        for view in grid.views:
            if view.box == (0.0, 0.0, 1.0, 1.0):
                check_view(view, tokens, 1.0 if blues is None else blues[number])
    assert not len(seen)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_cells_show_their_part_of_the_picture(name, mode):
    """A picture alone in a prompt, and of three others one that is not cut."""
    images = [gradient(*size) for size in (*SIZES[:2], (40, 50), SIZES[3])]
    pictures, texts, made = processed(images, 16 if mode == "16x" else 4, downsample_mode=mode)
    assert [grid for grid in made["grids"] if grid != [0, 0]] and [0, 0] in made["grids"]
    ids = prompts(texts[:1], texts[1:])
    pictures["downsample_mode"] = mode
    grids = picture_grids(ALL[name].model("sdpa"), {**pictures, "input_ids": ids}, images=images)
    assert [grid.prompt for grid in grids] == [0, 1, 1, 1]
    assert [len(grid.views) for grid in grids] == [1 + (g != [0, 0]) for g in made["grids"]]
    check(grids, colours(name, pictures), ids, IMAGE)


@torch.no_grad()
@pytest.mark.skipif("minicpm_ocr" not in ALL, reason="not in this transformers")
def test_slices_of_several_sizes_are_looks_of_their_own():
    """MiniCPM-OCR makes some of them smaller."""
    image = gradient(64, 128)
    slices = [image, *(image.crop((x, 0, x + 64, 64)) for x in (0, 64))]
    sizes = [(64, 32), (64, 64), (32, 32)]  # width, height
    pixels = [
        np.asarray(x.resize(size), np.float32).transpose(2, 0, 1) / 255
        for x, size in zip(slices, sizes, strict=True)
    ]
    pictures = {
        "pixel_values": torch.cat(
            [torch.tensor(PROCESSOR.reshape_by_patch(x, 4)) for x in pixels], -1
        )[None],
        "target_sizes": torch.tensor([[h // 4, w // 4] for w, h in sizes]),
    }
    ids = prompts(["<" + 8 * "i" + ">[" + 16 * "i" + "][" + 4 * "i" + "]"])
    model = ALL["minicpm_ocr"].model("sdpa")
    (grid,) = picture_grids(model, {**pictures, "input_ids": ids})
    whole, *crops = grid.views
    seen = colours("minicpm_ocr", pictures)
    check_view(whole, seen)
    assert [(crop.name, crop.box) for crop in crops] == [
        ("crop 1", (0.0, 0.0, 0.5, 1.0)),
        ("crop 2", (0.5, 0.0, 1.0, 1.0)),
    ]
    for crop in crops:
        rows, columns = crop.tokens.shape
        left, _, right, _ = crop.box
        x = left + (right - left) * (torch.arange(columns) + 0.5) / columns
        y = (torch.arange(rows) + 0.5) / rows
        torch.testing.assert_close(seen[crop.tokens][..., 0], x.expand(rows, -1), atol=0.03, rtol=0)
        torch.testing.assert_close(
            seen[crop.tokens][..., 1], y[:, None].expand(-1, columns), atol=0.03, rtol=0
        )


def video_of(images):
    """What the model is given of videos, each of as many frames, which are processed as pictures
    are; and their texts."""
    frames = [frame for video in images for frame in video]
    made = PROCESSOR(frames, return_tensors="pt")
    grids = torch.tensor(made["grids"])
    given = {
        "target_sizes_videos": made["target_sizes"],
        "num_frames_per_video": [len(video) for video in images],
        "grids_videos": grids,
    }
    texts = [
        MiniCPMV4_6Processor.replace_video_token(WRITER, given, video_idx=i, video_token_divisor=16)
        for i in range(len(images))
    ]
    pixels = {"pixel_values_videos": made["pixel_values"]}
    return pixels | {"target_sizes_videos": made["target_sizes"]}, texts, made


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_cells_show_their_part_of_the_frame(name, tmp_path):
    """A picture in slices, a video of three frames in slices, and one of two small frames."""
    videos = [
        [gradient(90, 140, blue=(i + 1) / 4) for i in range(3)],
        [gradient(40, 50, blue=(i + 1) / 4) for i in range(2)],
    ]
    given, texts, made = video_of(videos)
    image = gradient(150, 60)
    picture, words, _ = processed([image])
    ids = prompts(words + texts)
    inputs = {**given, **picture, "input_ids": ids}
    model = ALL[name].model("sdpa")
    first, *grids = picture_grids(model, inputs, images=[image], videos=videos)
    assert first.video is None and len(first.views) == 2
    assert [(grid.video, list(grid.frames)) for grid in grids] == [
        *((0, [i]) for i in range(3)),
        *((1, [i]) for i in range(2)),
    ]
    assert [len(grid.views) for grid in grids] == [2, 2, 2, 1, 1]
    pictures = {"pixel_values": made["pixel_values"], "target_sizes": made["target_sizes"]}
    check(grids, colours(name, pictures), ids, VIDEO, [0.25, 0.5, 0.75, 0.25, 0.5])
    inputs |= {"attention_mask": torch.ones_like(ids)}
    inputs |= {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if name != "minicpmv4_7":
        del inputs["mm_token_type_ids"]
    check_frames(model, inputs, grids, [image, *videos], tmp_path)


def check_frames(model, inputs, grids, shown, tmp_path):
    """Budgets, reports and drawings by frame."""
    for method in (vtp.RandomPruning(0, 0.25, per="frame"), vtp.FastV(2, 3, per="frame")):
        with vtp.prune(model, method) as run:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report, layer = run.report(), method.layer
        assert [unit.get("video") for unit in report.units] == [None, 0, 0, 0, 1, 1]
        assert [unit["tokens"] for unit in report.units[1:]] == [len(x.columns) for x in grids]
        for unit in report.units:
            expected = int(0.25 * unit["tokens"] + 0.5) if layer == 0 else 3
            assert unit["kept"][layer] == expected
        assert "video 1: 3 frames" in str(report) and "video 2: 2 frames" in str(report)
    every = picture_grids(model, inputs)
    vtp.plot.tokens(shown, report, tmp_path / "kept.png", grids=every)
    assert Image.open(tmp_path / "kept.png").width > 0
    with vtp.prune(model, vtp.FrameDifference(0.5)) as run:
        model(**inputs)
    kept = run.report().kept[0][0]
    for frames in (grids[:3], grids[3:]):  # a share of all tokens, those of slices among them
        stays = torch.stack([kept[grid.columns] for grid in frames])
        assert stays[0].all()
        assert stays.sum() == max(len(stays[0]), (stays.numel() + 1) // 2)


def test_words_that_are_not_the_processors():
    """A newline between rows of slices that is not there, and a mark that is another."""
    pictures, (text,), _ = processed([gradient(*SIZES[3])])
    model, given = ALL[NAMES[0]].model("sdpa"), {**pictures, "input_ids": prompts([text])}
    picture_grids(model, given)
    for wrong in (text.replace("\n", "", 1), text.replace("[", "<", 1)):
        with pytest.raises(NotImplementedError, match="input_ids: the words around pictures"):
            picture_grids(model, given | {"input_ids": prompts([wrong])})
    embeddings = model.get_input_embeddings()(given.pop("input_ids"))
    with pytest.raises(NotImplementedError, match="input_ids: a call that does not bring it"):
        picture_grids(model, given | {"inputs_embeds": embeddings})
