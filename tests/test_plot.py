"""Pictures of what was kept."""

import pytest
import torch
from PIL import Image

from vtp_kernels import plot


@pytest.fixture
def white():
    return Image.new("RGB", (64, 64), "white")


def panel(drawn, index, row, column, grid):
    """Brightness at the middle of a patch of a panel."""
    cell = plot._PANEL / grid
    x = index * (plot._PANEL + plot._GAP) + (column + 0.5) * cell
    y = plot._CAPTION + (row + 0.5) * cell
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
    assert drawn.width == 3 * (plot._PANEL + plot._GAP) - plot._GAP
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
