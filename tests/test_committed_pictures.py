"""The committed pictures: each has a command that draws it, and a page that shows it."""

import pytest
from PIL import Image

pytest.importorskip("transformers")

from benchmarks import pictures
from benchmarks.readme import RESULTS, ROOT


def test_every_committed_picture_is_drawn_by_the_command():
    committed = {str(path.relative_to(RESULTS)) for path in RESULTS.glob("*/*.png")}
    assert committed == set(pictures.PICTURES)


def test_every_committed_picture_is_on_a_page():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "".join(page.read_text() for page in pages)
    assert [name for name in pictures.PICTURES if f"benchmarks/results/{name}" not in shown] == []


def test_the_picture_of_the_readme_is_not_tall():
    assert Image.open(RESULTS / "intel-xeon-2-cores/kept.png").height <= 600


@pytest.mark.parametrize("name", [x for x in pictures.PICTURES if "kept" not in x])
def test_pictures_are_drawn_in_the_size_of_the_committed_ones(name, tmp_path, capsys):
    pictures.main([name, "--into", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    assert Image.open(tmp_path / name).size == Image.open(RESULTS / name).size


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        pictures.main(["none.png"])
    assert "unknown none.png; there are" in capsys.readouterr().err
