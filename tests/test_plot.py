"""Pictures of what was kept."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_llava import IMAGE, batch, prompt, tiny_llava

import vtp_kernels as vtp
from vtp_kernels import plot
from vtp_kernels.models.pictures.grids import PictureGrid, View, picture_grids


@pytest.fixture
def white():
    return Image.new("RGB", (64, 64), "white")


def panel(drawn, index, row, column, grid):
    """Brightness at the middle of a patch of a panel."""
    cell = plot.PANEL / grid
    x = index * (plot.PANEL + plot._GAP) + (column + 0.5) * cell
    y = plot.CAPTION + (row + 0.5) * cell
    return drawn.getpixel((int(x), int(y)))[0]


def test_kept_patches_stay_bright_and_dropped_ones_are_dimmed(white, tmp_path):
    mask = torch.rand(4, 4) < 0.5
    drawn = plot.tokens(white, {3: mask.flatten()[None]}, tmp_path / "kept.png")
    assert Image.open(tmp_path / "kept.png").size == drawn.size
    for row in range(4):
        for column in range(4):
            assert panel(drawn, 0, row, column, 4) == 255  # the first panel is the picture
            assert (panel(drawn, 1, row, column, 4) == 255) == bool(mask[row, column])


def test_one_panel_a_layer_in_order(white):
    drawn = plot.tokens(
        white, {5: torch.ones(4, dtype=torch.bool), 2: torch.zeros(4, dtype=torch.bool)}
    )
    assert drawn.width == 3 * (plot.PANEL + plot._GAP) - plot._GAP
    assert panel(drawn, 1, 0, 0, 2) < 100 and panel(drawn, 2, 0, 0, 2) == 255


def test_visual_positions_are_picked_out_of_the_sequence(white):
    kept = torch.tensor([[True] * 4, [True, False, True, True]])
    visual = torch.tensor([[True] * 4, [False, True, False, False]])
    drawn = plot.tokens(white, {1: kept}, visual=visual, sample=1)
    assert panel(drawn, 1, 0, 0, 1) < 100


@pytest.fixture
def wide():
    """Two cells of 2 x 4 and one row that shows nothing, from two stretches of a sequence."""
    picture = Image.new("RGB", (80, 40), "white")
    first = View("whole", torch.arange(2).view(1, 2), (0.0, -0.5, 1.0, 1.5))
    crops = View("crops", torch.arange(8).view(2, 4) + 2, (0.0, 0.0, 1.0, 1.0))
    grids = [
        PictureGrid(1, torch.arange(3, 14), (first, crops)),
        PictureGrid(1, torch.arange(15, 19), (View("whole", torch.arange(4).view(2, 2)),)),
        PictureGrid(0, torch.arange(4), (View("whole", torch.arange(4).view(2, 2)),)),
    ]
    return picture, grids


def brightness(drawn, line, index, x, y, size=(224, 112)):
    """At a place of a panel, in shares of its width and height; all lines of one height."""
    left, top = index * (plot.PANEL + plot._GAP), line * (size[1] + plot.CAPTION + plot._GAP)
    return drawn.getpixel((int(left + x * size[0]), int(top + plot.CAPTION + y * size[1])))[0]


def test_pictures_of_any_shape_have_a_row_for_each_look(wide):
    picture, grids = wide
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[1, 4] = False  # the right half of the whole picture
    kept[1, 5] = kept[1, 12] = False  # crops: first cell, last cell
    kept[1, 17] = False  # second picture: third cell
    drawn = plot.tokens([picture, picture], {2: kept}, grids=grids, sample=1)
    assert drawn.size == (2 * plot.PANEL + plot._GAP, 3 * (112 + plot.CAPTION + plot._GAP))
    for line in range(3):
        assert brightness(drawn, line, 0, 0.5, 0.5) == 255
    whole = [brightness(drawn, 0, 1, x, 0.5) for x in (0.25, 0.75)]
    assert whole[0] == 255 and whole[1] < 100
    crops = [
        [brightness(drawn, 1, 1, (j + 0.5) / 4, (i + 0.5) / 2) == 255 for j in range(4)]
        for i in range(2)
    ]
    assert crops == [[False, True, True, True], [True, True, True, False]]
    second = [brightness(drawn, 2, 1, x, y) == 255 for y in (0.25, 0.75) for x in (0.25, 0.75)]
    assert second == [True, True, False, True]


def test_what_is_not_shown_to_the_model_is_white():
    black = Image.new("RGB", (80, 40), "black")
    middle = View("whole", torch.arange(4).view(2, 2), (0.25, 0.0, 0.75, 1.0))
    grids = [PictureGrid(0, torch.arange(4), (middle,))]
    drawn = plot.tokens(black, {0: torch.ones(1, 4, dtype=torch.bool)}, grids=grids)
    seen = [brightness(drawn, 0, 1, x, 0.5) for x in (0.1, 0.3, 0.7, 0.9)]
    assert seen == [255, 0, 0, 255]
    assert brightness(drawn, 0, 0, 0.1, 0.5) == 0  # the first panel is the picture


def test_a_report_is_drawn_with_all_its_pictures(white):
    """Two pictures, no grids: stretches of visual tokens, or equal parts of one stretch."""
    model = tiny_llava()
    apart = batch(prompt(2, 5, seed=0))
    together = dict(apart)
    ids = apart["input_ids"]
    together["input_ids"] = torch.cat((ids[ids != IMAGE][:5], ids[ids == IMAGE], ids[0, -5:]))[None]
    together["attention_mask"] = torch.ones_like(together["input_ids"])
    for inputs in (apart, together):
        with vtp.prune(model, vtp.FastV(layer=2, keep=0.5)) as run, torch.no_grad():
            model(**inputs)
        report = run.report()
        drawn = plot.tokens([white, white], report)
        again = plot.tokens([white, white], report.kept)
        by_grids = plot.tokens([white, white], report, grids=picture_grids(model, inputs))
        assert drawn.height == 2 * (plot.PANEL + plot.CAPTION + plot._GAP)
        assert np.array_equal(drawn, again) and np.array_equal(drawn, by_grids)
        stayed = report.kept[2][report.kept.visual].view(2, 4, 4)
        for picture in range(2):
            for row in range(4):
                for column in range(4):
                    at = (column + 0.5) / 4, (row + 0.5) / 4
                    light = brightness(drawn, picture, 1, *at, size=(224, 224)) == 255
                    assert light == bool(stayed[picture, row, column])


def test_a_picture_at_the_end_of_its_prompt(white):
    """Its last token has the logits, and always stays: grids know that it shows something."""
    model, inputs = tiny_llava(), batch(prompt(1, 0, seed=0)[:-2])
    assert inputs["input_ids"][0, -1] == IMAGE
    with vtp.prune(model, vtp.Schedule({2: 0})) as run, torch.no_grad():
        model(**inputs)
    with pytest.raises(ValueError, match="grid: expected 15 cells"):
        plot.tokens(white, run.report())
    drawn = plot.tokens(white, run.report(), grids=picture_grids(model, inputs))
    lights = [brightness(drawn, 0, 1, 0.9, y, size=(224, 224)) == 255 for y in (0.6, 0.9)]
    assert lights == [False, True]


def test_pictures_that_do_not_fit_are_refused(white, wide):
    _, grids = wide
    kept = {2: torch.ones(2, 20, dtype=torch.bool)}
    with pytest.raises(ValueError, match="image: expected the 2 pictures of the prompt, got 1"):
        plot.tokens(white, kept, grids=grids, sample=1)
    with pytest.raises(ValueError, match=r"kept: with grids expected bool .* at least 19 columns"):
        plot.tokens([white, white], {2: kept[2][:, :18]}, grids=grids, sample=1)
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[0, 2:6] = visual[0, 8:12] = visual[0, 14:18] = True
    for images in (white, [white] * 2):
        with pytest.raises(ValueError, match="image: the visual tokens stand in 3 places"):
            plot.tokens(images, {2: kept[2][:1]}, visual=visual)
    assert plot.tokens([white] * 3, {2: kept[2][:1]}, visual=visual).height > 3 * plot.PANEL


@pytest.fixture
def moving():
    """A picture of four tokens, then ten frames of four in five grids, in prompt 1."""
    corners = View("whole", torch.arange(4).view(2, 2))
    grids = [PictureGrid(1, torch.arange(1, 5), (corners,))]
    for t in range(5):
        columns = torch.arange(6 + 5 * t, 10 + 5 * t)  # a timestamp before each
        grids.append(PictureGrid(1, columns, (corners,), 0, range(2 * t, 2 * t + 2)))
    return grids


def test_frames_are_drawn_on_a_sheet_for_each_layer(white, moving):
    kept = torch.ones(2, 30, dtype=torch.bool)
    kept[1, 7] = kept[1, 28] = False  # second cell of the first grid, third of the last
    frames = [Image.new("RGB", (64, 32), "white")] * 10
    layers = {2: torch.ones(2, 30, dtype=torch.bool), 3: kept}
    drawn = plot.tokens([white, frames], layers, grids=moving, sample=1)
    panels, sheet = plot.PANEL + plot.CAPTION + plot._GAP, 2 * plot.CAPTION + 56 + plot._GAP
    assert drawn.height == panels + 2 * sheet
    for number, mask in enumerate(layers.values()):
        for index in range(5):
            for cell, stays in enumerate(mask[1, moving[1 + index].columns].tolist()):
                x = index * (plot.FRAME + plot._GAP) + (cell % 2 + 0.5) * plot.FRAME / 2
                y = panels + number * sheet + 2 * plot.CAPTION + (cell // 2 + 0.5) * 28
                assert (drawn.getpixel((int(x), int(y)))[0] == 255) == stays
    # Frames that are left over, or all of them: the first of each pair is drawn.
    assert plot.tokens([white, frames[:9]], layers, grids=moving, sample=1).size == drawn.size


def test_frames_that_do_not_fit_are_refused(white, moving):
    kept = {2: torch.ones(2, 30, dtype=torch.bool)}
    for pictures, message in (
        ([white, [white] * 8], "number 2 in the prompt is a video of 10 frames, got 8 frames"),
        ([white, [white] * 11], "number 2 in the prompt is a video of 10 frames, got 11 frames"),
        ([white, white], "number 2 in the prompt is a video of 10 frames, got a picture"),
        ([[white] * 9, [white] * 9], "number 1 in the prompt is a picture, got frames"),
        ([white] * 11, "expected the 2 pictures of the prompt, got 11; a video is a sequence"),
    ):
        with pytest.raises(ValueError, match=f"image: {message}"):
            plot.tokens(pictures, kept, grids=moving, sample=1)
    with pytest.raises(ValueError, match="grids: which token shows which frame"):
        plot.tokens([white, [white] * 10], kept)


def test_tokens_kept_over_time(tmp_path):
    units = [
        {"prompt": 0, "video": 0, "frames": [f], "tokens": 8, "kept": {2: 8 - f, 4: f}}
        for f in range(8)
    ]
    report = SimpleNamespace(units=units, kept={2: None, 4: None})
    drawn = plot.over_time(report, tmp_path / "time.png")
    assert Image.open(tmp_path / "time.png").size == drawn.size
    dark = np.asarray(drawn.convert("L")) < 40  # the last layer's line alone, and the words
    rows = [dark[plot.CAPTION + 4 :, x].nonzero()[0] for x in range(20, drawn.width - 20, 54)]
    heights = [int(found.mean()) for found in rows]
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[-1] + 100
    with pytest.raises(ValueError, match="report: no frames of a video 1 in prompt 0"):
        plot.over_time(report, video=1)


def test_errors_name_the_argument(white, tmp_path):
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="grid: expected 5 cells"):
        plot.tokens(white, {0: mask})
    with pytest.raises(ValueError, match="sample: expected 0 to 0, got 1"):
        plot.tokens(white, {0: mask}, sample=1, grid=(1, 5))
    with pytest.raises(FileNotFoundError, match="image: no such file"):
        plot.tokens(tmp_path / "none.png", {0: mask})
    with pytest.raises(TypeError, match="image: expected a path or a PIL image, got Tensor"):
        plot.tokens(mask, {0: mask})


def red(drawn):
    """Columns of a curve's picture in which there is a red line from top to bottom."""
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    is_red = (pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 60)
    return (is_red.sum(0) > plot.PANEL / 2).nonzero()[0]


@pytest.mark.parametrize("rule", ["chord", "kneedle", "iqr", "mass"])
def test_a_curve_is_drawn_with_its_knee(draw, tmp_path, rule):
    features, cls = draw.normal(2, 120, 8), draw.normal(2, 8)
    pair = vtp.cls_inflection(features, cls, rule=rule)
    drawn = plot.curve(pair, tmp_path / "curve.png", sample=1)
    assert Image.open(tmp_path / "curve.png").size == drawn.size == (plot.PANEL, plot.PANEL)
    count = int(pair[0].counts[1])
    margin = plot._MARGIN
    expected = margin + (plot.PANEL - 2 * margin) * (count - 1) / 119
    [at] = red(drawn)[:1]
    assert abs(at - expected) <= 1
    # The curve itself, on its first and last score: it falls from the upper to the lower margin.
    black = np.asarray(drawn.convert("L")) < 60
    assert black[:, margin].nonzero()[0].min() <= margin + 2
    assert black[:, -margin - 3 : -margin + 1].nonzero()[0].max() >= plot.PANEL - margin - 2


def test_curves_of_one_score_and_none(draw):
    for scores in ([[0.5]], [[math.nan, math.nan]], [[0.25] * 5], [[math.inf, 1.0, 0.0, 0.0]]):
        curve = torch.tensor(scores)
        assert plot.curve((vtp.inflection(curve), curve)).size == (plot.PANEL, plot.PANEL)


def test_infinite_scores_are_before_the_curve():
    curve = torch.tensor([[5.0, math.inf, 4.0, 1.0, math.inf, 0.9, 0.8, math.nan, 0.7]])
    selection = vtp.inflection(curve, clip_quantile=1.0)
    drawn = plot.curve((selection, curve))
    finite = torch.tensor([[5.0, 4.0, 1.0, 0.9, 0.8, 0.7]])
    alone = plot.curve((vtp.inflection(finite, clip_quantile=1.0), finite))
    assert red(drawn).tolist() == red(alone).tolist() != []


def test_errors_of_curves_name_the_argument(draw):
    curve = draw.normal(2, 9)
    selection = vtp.inflection(curve)
    with pytest.raises(TypeError, match=r"selection: expected the pair \(Selection, scores\)"):
        plot.curve(selection)
    with pytest.raises(ValueError, match=r"selection: expected scores \[2, N\], got \[3, 9\]"):
        plot.curve((selection, draw.normal(3, 9)))
    with pytest.raises(ValueError, match="sample: expected 0 to 1, got 2"):
        plot.curve((selection, curve), sample=2)
