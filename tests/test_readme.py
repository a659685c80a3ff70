"""The README says what the committed result files say, and names commands and files that exist."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import readme

ROOT = Path(__file__).parents[1]
TEXT = readme.README.read_text()


def test_measured_blocks_are_those_of_the_result_files():
    assert readme.filled(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_a_changed_number_is_noticed():
    number = re.search(r"<!-- accuracy -->.*?(\d\d\.\d)", TEXT, re.DOTALL)
    changed = TEXT[: number.start(1)] + "12.3" + TEXT[number.end(1) :]
    assert readme.filled(changed) == TEXT


def test_a_missing_block_is_named():
    with pytest.raises(ValueError, match="block 'demo'"):
        readme.filled(TEXT.replace("<!-- demo -->", ""))


def test_pictures_and_linked_files_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_every_make_target_exists_and_ci_runs_the_test_command():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", TEXT)) <= targets
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()
