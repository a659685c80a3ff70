"""Pictures of what was kept."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import vtp_kernels as vtp
from vtp_kernels import plot


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


def test_errors_name_the_argument(white, tmp_path):
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="grid: expected 5 cells"):
        plot.tokens(white, {0: mask})
    with pytest.raises(ValueError, match="sample: expected 0 to 0, got 1"):
        plot.tokens(white, {0: mask}, sample=1, grid=(1, 5))
    with pytest.raises(FileNotFoundError, match="image: no such file"):
        plot.load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"image: .*text.png.* cannot be read as a picture"):
        plot.load_image(tmp_path / "text.png")
    with pytest.raises(TypeError, match="image: expected a path or a PIL image, got Tensor"):
        plot.load_image(mask)


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
