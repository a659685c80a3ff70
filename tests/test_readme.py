"""Measured blocks of the pages say what the committed result files say."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import readme

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", readme.PAGES)
def test_measured_blocks_are_those_of_the_result_files(page):
    text = (ROOT / page).read_text()
    assert readme.filled(page, text) == text, "run python -m benchmarks.readme"


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    number = re.search(r"<!-- summary -->.*?(\d\d\.\d)", text, re.DOTALL)
    changed = text[: number.start(1)] + "12.3" + text[number.end(1) :]
    assert readme.filled("README.md", changed) == text


def test_a_missing_block_is_named():
    text = (ROOT / "README.md").read_text()
    with pytest.raises(ValueError, match=r"README\.md: expected one block 'demo'"):
        readme.filled("README.md", text.replace("<!-- demo -->", ""))


def test_no_page_has_a_block_that_nothing_fills():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")):
        name = str(page.relative_to(ROOT))
        blocks = set(re.findall(r"<!-- (\w+) -->", page.read_text()))
        assert blocks == set(readme.PAGES.get(name, ())), name


def test_ci_runs_the_test_command():
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
