"""Pictures of what was kept."""

import importlib
import itertools
import json
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

from tiny_llava import IMAGE, batch, prompt, three, tiny_llava

import vtp_kernels as vtp
from vtp_kernels import plot
from vtp_kernels.models import Report
from vtp_kernels.models.pictures.grids import PictureGrid, View, picture_grids
from vtp_kernels.plot import figure, labels, names, sheet
from vtp_kernels.plot.sheet import CAPTION, GAP
from vtp_kernels.plot.tokens import FRAME, PANEL, SMALL

# The functions of these names hide their modules.
curve_module, layers_module, over_time, tradeoff_module = (
    importlib.import_module(f"vtp_kernels.plot.{name}")
    for name in ("curve", "layers", "over_time", "tradeoff")
)


@pytest.fixture
def white():
    return Image.new("RGB", (64, 64), "white")


def panel(drawn, index, row, column, grid):
    """Brightness at the middle of a patch of a panel."""
    cell = PANEL / grid
    x = index * (PANEL + GAP) + (column + 0.5) * cell
    y = CAPTION + (row + 0.5) * cell
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
    assert drawn.width == 3 * (PANEL + GAP) - GAP
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
    left, top = index * (PANEL + GAP), line * (size[1] + CAPTION + GAP)
    return drawn.getpixel((int(left + x * size[0]), int(top + CAPTION + y * size[1])))[0]


def test_pictures_of_any_shape_have_a_row_for_each_look(wide):
    picture, grids = wide
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[1, 4] = False  # the right half of the whole picture
    kept[1, 5] = kept[1, 12] = False  # crops: first cell, last cell
    kept[1, 17] = False  # second picture: third cell
    drawn = plot.tokens([picture, picture], {2: kept}, grids=grids, sample=1)
    assert drawn.size == (2 * PANEL + GAP, 3 * (112 + CAPTION + GAP))
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
        assert drawn.height == 2 * (PANEL + CAPTION + GAP)
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
    assert plot.tokens([white] * 3, {2: kept[2][:1]}, visual=visual).height > 3 * PANEL


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
    panels, sheet = PANEL + CAPTION + GAP, 2 * CAPTION + 56 + GAP
    assert drawn.height == panels + 2 * sheet
    for number, mask in enumerate(layers.values()):
        for index in range(5):
            for cell, stays in enumerate(mask[1, moving[1 + index].columns].tolist()):
                x = index * (FRAME + GAP) + (cell % 2 + 0.5) * FRAME / 2
                y = panels + number * sheet + 2 * CAPTION + (cell // 2 + 0.5) * 28
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
    first, last = (x.get_data() for x in over_time._figure(units).axes[0].patches)
    assert first.values.tolist() == [100 * (8 - f) / 8 for f in range(8)]
    assert last.values.tolist() == [100 * f / 8 for f in range(8)]
    assert last.edges.tolist() == [f + 0.5 for f in range(9)]
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


def lines(drawn):
    """(x, y) of the points, the knee's line and the curve of a curve's figure."""
    return {line.get_color(): np.array(line.get_xydata()) for line in drawn.axes[0].lines}


@pytest.mark.parametrize("rule", ["chord", "kneedle", "iqr", "mass"])
def test_a_curve_is_drawn_with_its_knee(draw, tmp_path, rule):
    features, cls = draw.normal(2, 120, 8), draw.normal(2, 8)
    pair = vtp.cls_inflection(features, cls, rule=rule)
    drawn = plot.curve(pair, tmp_path / "curve.png", sample=1)
    assert Image.open(tmp_path / "curve.png").size == drawn.size == curve_module.SIZE
    count = int(pair[0].counts[1])
    scores = pair[1][1].sort(descending=True)[0]
    found = lines(curve_module._figure(*curve_module._curve_of(pair, 1), 120))
    knee, points = found[figure.COLORS[1]], found[figure.COLORS[0]]
    assert knee.tolist() == [[count, pytest.approx(float(scores[count - 1]))]]
    assert np.allclose(points, np.stack((np.arange(1, 121), scores.numpy()), 1))


def test_curves_of_one_score_and_none(draw):
    for scores in ([[0.5]], [[math.nan, math.nan]], [[0.25] * 5], [[math.inf, 1.0, 0.0, 0.0]]):
        scores = torch.tensor(scores)
        assert plot.curve((vtp.inflection(scores), scores)).size == curve_module.SIZE


def test_infinite_scores_are_before_the_curve():
    scores = torch.tensor([[5.0, math.inf, 4.0, 1.0, math.inf, 0.9, 0.8, math.nan, 0.7]])
    selection = vtp.inflection(scores, clip_quantile=1.0)
    finite, above, count = curve_module._curve_of((selection, scores), 0)
    points = lines(curve_module._figure(finite, above, count, 9))[figure.COLORS[0]]
    assert above == 2 and points[:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    alone = torch.tensor([[5.0, 4.0, 1.0, 0.9, 0.8, 0.7]])
    assert count == 2 + int(vtp.inflection(alone, clip_quantile=1.0).counts[0])


def test_errors_of_curves_name_the_argument(draw):
    curve = draw.normal(2, 9)
    selection = vtp.inflection(curve)
    with pytest.raises(TypeError, match=r"selection: expected the pair \(Selection, scores\)"):
        plot.curve(selection)
    with pytest.raises(ValueError, match=r"selection: expected scores \[2, N\], got \[3, 9\]"):
        plot.curve((selection, draw.normal(3, 9)))
    with pytest.raises(ValueError, match="sample: expected 0 to 1, got 2"):
        plot.curve((selection, curve), sample=2)


def test_methods_stand_side_by_side(white, tmp_path):
    """A column each, with a panel for each layer at which tokens left; nothing beside that."""
    few, all_of_them = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    reports = {"one": {2: few}, "two": {1: all_of_them, 3: few}, "none": {}}
    drawn = plot.methods(white, reports, tmp_path / "kept.png", visual=None, grid=(2, 2))
    pitch, row = SMALL + GAP, SMALL + CAPTION
    assert Image.open(tmp_path / "kept.png").size == drawn.size
    assert drawn.size == (4 * pitch - GAP, CAPTION + 2 * row + GAP)

    def light(column, line):
        at = column * pitch + SMALL // 3, CAPTION + line * row + CAPTION + SMALL // 3
        return drawn.getpixel(at)[0] == 255

    assert [light(column, 0) for column in range(4)] == [True, False, True, True]
    assert [light(column, 1) for column in range(4)] == [True, True, False, True]
    long = plot.methods(white, reports | {"one of a name that is too long for a line": {}})
    assert long.size == (drawn.width + pitch, drawn.height + 2 * CAPTION)
    with pytest.raises(ValueError, match="reports: expected at least one method"):
        plot.methods(white, {})


def test_words_end_where_the_next_picture_begins(white):
    """A long caption is cut off, and so is no short one."""
    drawn = figure.new_figure(300, 40, 72)
    for words in ("layer 2", "layer 2, " * 30):
        sheet.write(drawn, words, 20, 4, 100)
    short, long = drawn.texts
    assert short.get_text() == "layer 2" and long.get_text().endswith("…")
    assert figure.box_of(long)[2] <= 120 and figure.box_of(long)[2] > 100


def test_a_sheet_ends_where_a_file_of_it_would_be_too_high(white, tmp_path):
    """The rows that have no room are counted, and it can be written in every usual format."""
    stays = torch.ones(1, 80 * 4, dtype=torch.bool)
    all_fit = plot.tokens([white] * 66, {1: stays[:, : 66 * 4]})
    assert all_fit.height == 66 * (PANEL + CAPTION + GAP)
    drawn = plot.tokens([white] * 80, {1: stays}, tmp_path / "kept.webp")
    assert drawn.height == 65 * (PANEL + CAPTION + GAP) + CAPTION <= sheet.HIGHEST
    assert np.asarray(drawn)[-CAPTION:].min() < 128  # the line that says so
    assert Image.open(tmp_path / "kept.webp").size == drawn.size
    row = [sheet.Cell("", white)]
    blocks = [sheet.Block([row] * 400, 64, ["a"]), sheet.Block([row], 64)]
    (shown,), left_out = sheet._that_fit(blocks)
    assert len(shown.rows) + left_out == 401 and left_out > 1
    assert sheet.HIGHEST - CAPTION - 82 < shown.height <= sheet.HIGHEST - CAPTION


@pytest.mark.parametrize(
    "name, error", (("kept.docx", ValueError), ("kept", ValueError), ("no/kept.png", OSError))
)
def test_a_path_that_cannot_be_written_is_named(white, tmp_path, name, error):
    with pytest.raises(error, match=f"^path: .*{name}'"):
        plot.tokens(white, {}, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_path_is_named_where_writing_fails(white, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"^path: cannot write '.*kept\.jpg': encoder error -2"):
        plot.tokens(white, {}, tmp_path / "kept.jpg")


@pytest.fixture(scope="module")
def report():
    model = tiny_llava()
    with vtp.prune(model, vtp.PyramidDrop((2, 4), (0.5, 3))) as run, torch.no_grad():
        model(**three())
        return run.report()


def test_tokens_left_by_layer(report, tmp_path):
    drawn = plot.layers(report, tmp_path / "layers.png", sample=1)
    assert Image.open(tmp_path / "layers.png").size == drawn.size
    dense, counts = layers_module._counts(report, 1)
    assert dense == 32 and counts == [32, 32, 16, 16, 3, 3]
    both = layers_module._figure(dense, {"pyramid": counts, "mine": [5] * 6})
    steps = [patch.get_data().values.tolist() for patch in both.axes[0].patches]
    assert steps == [counts, [5] * 6]
    (line,) = both.axes[0].lines
    assert line.get_ydata().tolist() == [32, 32]
    assert [text.get_text() for text in both.axes[0].texts] == [
        "pyramid: 3 of 32",
        "mine: 5 of 32",
        "no pruning",
    ]
    for reports, message in (
        ({}, "report: expected at least one"),
        ({"a": [4, 4], "b": [4]}, "report: expected models of one depth"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.layers(reports)
    with pytest.raises(ValueError, match="sample: expected 0 to 3, got 4"):
        plot.layers(report, sample=4)


def test_heights_are_moved_apart_and_no_more_than_that():
    assert labels.apart([0, 50, 100], 10, 0) == [0, 50, 100]
    assert labels.apart([50, 50, 50, 90], 10, 0) == [40, 50, 60, 90]
    assert labels.apart([0, 1, 2], 10, 0) == [0, 10, 20]  # none below the floor
    moved = labels.apart([3, 4, 11, 12, 18, 60], 10, 0)
    assert all(b - a >= 10 for a, b in itertools.pairwise(moved))


def test_names_of_a_tradeoff_lie_over_nothing(tmp_path):
    """However crowded the points are, and some of them are the same."""
    random = np.random.default_rng(7)
    shares = np.concatenate((random.uniform(0.9, 0.99, (12, 2)), [[0.95, 0.95]] * 2))
    points = {f"a method with a name, {i}": tuple(pair) for i, pair in enumerate(shares)}
    drawn = plot.tradeoff(points, tmp_path / "it.png")
    assert Image.open(tmp_path / "it.png").size == drawn.size
    lines = {name: [pair] for name, pair in points.items()}
    axes = next(
        made.axes[0]
        for height in tradeoff_module.HEIGHTS
        if (made := tradeoff_module._figure(lines, height, "saved", "right", False)) is not None
    )
    boxes = [figure.box_of(text) for text in axes.texts]
    spots = [axes.transData.transform((100 * x, 100 * y)) for x, y in points.values()]
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    assert len(boxes) == len(points)
    for one, other in itertools.combinations(boxes, 2):
        assert not labels.overlap(one, other, room=0)
    assert not any(labels.overlap(box, dot, room=0) for box in boxes for dot in dots)
    width, height = drawn.size
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= width and b[3] <= height for b in boxes)


def test_several_points_of_a_method_are_a_line(tmp_path):
    lines = {"FastV": [(0.3, 0.9), (0.5, 0.8), (0.8, 0.4)], "none": (0.0, 0.95)}
    figure = tradeoff_module._figure(
        {name: tradeoff_module._line(name, line) for name, line in lines.items()},
        *(tradeoff_module.HEIGHTS[0], "saved", "right", False),
    )
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[30, 90], [50, 80], [80, 40]] in [[[round(v) for v in p] for p in x] for x in drawn]
    assert {text.get_text() for text in figure.axes[0].texts} == {"FastV", "no pruning"}


def test_names_do_not_lie_over_lines():
    """Ten lines that end close to each other, as those of a leaderboard do."""
    random = np.random.default_rng(3)
    middles, ends = random.uniform(0.95, 0.99, 10), random.uniform(0.8, 0.95, 10)
    lines = {
        f"method {i}": [(0.78, 0.99), (0.89, middles[i]), (0.93 + i % 2 / 100, ends[i])]
        for i in range(10)
    }
    axes = next(
        made.axes[0]
        for height in tradeoff_module.HEIGHTS
        if (made := tradeoff_module._figure(lines, height, "saved", "right", False)) is not None
    )
    boxes = [figure.box_of(text) for text in axes.texts]
    assert len(boxes) == len(lines)
    for line in lines.values():
        along = np.linspace(0, 1, 200)[:, None]
        for start, end in itertools.pairwise(100 * np.array(line)):
            for x, y in axes.transData.transform(start + (end - start) * along):
                assert not any(a <= x <= c and b <= y <= d for a, b, c, d in boxes)


def test_what_is_no_tradeoff_is_refused():
    with pytest.raises(ValueError, match="points: expected at least one method"):
        plot.tradeoff({})
    with pytest.raises(ValueError, match=r"points: expected two shares from 0 to 1, got .* 'b'"):
        plot.tradeoff({"a": (0.5, 1.0), "b": (50, 99.8)})
    with pytest.raises(ValueError, match="points: 300 are too many"):
        plot.tradeoff({f"the method of number {i}": (0.5, 0.5) for i in range(300)})


def test_methods_in_words():
    specs = ["none", "fastv:2:0.5", "random:0.22", "schedule:4=64", "visipruner:shallow_layers=2"]
    assert plot.readable(specs) == [
        "no pruning",
        "FastV, 50 % from layer 2",
        "22 % by chance",
        "Schedule, 64 tokens from layer 4",
        "VisiPruner",
    ]
    several = ["inflection:source=attention,min_keep=64", "inflection:rule=iqr,llm_layers="]
    assert plot.readable(several) == [
        "InflectionPruning, attention, chord, at least 64, both stages",
        "InflectionPruning, similarity, iqr, stage 1 alone",
    ]
    alike = [vtp.VisiPruner(min_keep=1), vtp.VisiPruner(min_keep=2), vtp.FastV(3, 0.1)]
    assert plot.readable(alike)[:2] == ["VisiPruner, min keep 1", "VisiPruner, min keep 2"]
    assert plot.readable([vtp.FastV(3, 64), vtp.FastV(3, 64, per="frame")]) == [
        "FastV, 64 tokens from layer 3 (per prompt)",
        "FastV, 64 tokens from layer 3 (per frame)",
    ]
    assert plot.readable(["random", "RandomPruning"]) == ["random", "RandomPruning"]
    assert plot.readable([vtp.Schedule({3: 0.5}), "fastv"])[0] == "Schedule, 50 % from layer 3"
    chain = "chain:divprune:keep=192 + fastv:2:0.25"
    assert plot.readable([chain, "divprune:keep=0.1", "vidcom2:keep=64"]) == [
        "DivPrune, 192 tokens + FastV, 25 % from layer 2",
        "DivPrune, 10 %",
        "VidCom2, 64 tokens",
    ]
    before = ["visionzip:keep=64", "vispruner:keep=0.25", "hiprune:keep=64", "dart:layer=2,keep=9"]
    assert plot.readable([*before, "sparsevlm:layers=2+6,keep=0.5+0.2"]) == [
        "VisionZip, 64 tokens",
        "VisPruner, 25 %",
        "HiPrune, 64 tokens",
        "DART, 9 tokens from layer 2",
        "SparseVLM, 50, 20 % from layers 2, 6",
    ]
    assert names.kind_of(plot.readable([chain])[0]) == "DivPrune + FastV"
    for nothing in ("chain", "chain:fastv", "chain:fastv + os:system", "chain:random + it.json"):
        assert plot.readable([nothing]) == [nothing]  # and nothing is imported, or read
    words = ["FastV, of old", "random", "os:system:x=1", "none.json", "fastv:what", "objects:40"]
    assert plot.readable(words) == [words[0], "RandomPruning", *words[2:]]
    assert [names.kind_of(name) for name in plot.readable(specs)] == [
        "no pruning",
        "FastV",
        "chance",
        "Schedule",
        "VisiPruner",
    ]


def test_without_matplotlib_the_extra_is_named(white, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'vtp_kernels\[plot\]'"):
        plot.tokens(white, {0: torch.ones(4, dtype=torch.bool)}, tmp_path / "it.png")
    assert not (tmp_path / "it.png").exists()


def test_a_report_that_was_saved_is_drawn_the_same(report, white, tmp_path):
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.to_dict() == report.to_dict()
    drawn, once_more = (plot.tokens([white] * 2, x, sample=1) for x in (report, again))
    assert np.array_equal(drawn, once_more)
    plain = report.to_dict()
    for changed in ({}, [], plain | {"visual": [[999]] * 4}, plain | {"kept": 3}):
        (tmp_path / "other.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"other\.json: expected what report\.save\(\) wrote"):
            Report.load(tmp_path / "other.json")
