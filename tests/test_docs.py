"""The documentation: links lead somewhere, pages are found, and the worked example runs."""

import pkgutil
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("**/*.md"),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    ]
)
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?:\]\(|(?:src|href)=")(?!\w+:)([^)"\s]*)')


def prose(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))


@cache
def anchors(page):
    """Names of a page's headings, as code hosts and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "]", heading)).strip().lower()
        found.add(re.sub(r"\s", "-", words))
    return found


def broken(page, text):
    """Links of a page to files or headings that are not there."""
    missing = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert broken(page, prose(page)) == []


def test_links_to_nothing_are_noticed():
    text = "[a](nothing.md) [b](docs/index.md#nowhere) [c](docs/index.md) [d](https://a.b/c)"
    assert broken(ROOT / "README.md", text) == ["nothing.md", "docs/index.md#nowhere"]


def test_every_page_is_in_the_navigation():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("**/*.md"))


DOCUMENTED = re.compile(r"^::: ([\w.]+)\n((?: +\S.*\n)*)", re.MULTILINE)


@pytest.mark.parametrize(
    "page", [x for x in PAGES if DOCUMENTED.search(x.read_text())], ids=lambda page: page.name
)
def test_docstrings_are_read_in_the_style_they_are_written_in(page):
    """In the other one their arguments would be shown as plain words."""
    wrong = []
    for path, options in DOCUMENTED.findall(page.read_text()):
        words = pkgutil.resolve_name(path).__doc__
        google = re.search(r"^ *(Args|Attributes|Returns|Raises):$", words, re.MULTILINE)
        if google and "docstring_style: google" not in options:
            wrong.append(path)
        if re.search(r"^ *-{4,}$", words, re.MULTILINE) and "docstring_style: google" in options:
            wrong.append(path)
    assert wrong == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_make_target_that_pages_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page


def test_the_method_of_your_own_runs(tmp_path, monkeypatch):
    """docs/own_method.md, block by block: its asserts are those of the page."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from tiny_llava import three, tiny_llava

    from vtp_kernels.contract.method import METHODS

    monkeypatch.setitem(METHODS, "lastwords", None)  # its key goes with the test
    monkeypatch.delitem(METHODS, "lastwords")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    method, *uses = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "own_method.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(uses) == 2
    (tmp_path / "last_words.py").write_text(textwrap.dedent(method))
    names = {"model": tiny_llava(), "inputs": three()}
    exec("import vtp_kernels as vtp\nfrom last_words import LastWords", names)
    exec(uses[0], names)
    report = names["run"].report()
    assert report.visual_tokens_per_layer[3] == [n // 4 for n in report.visual_tokens_per_layer[2]]
    exec(uses[1], names)
    with pytest.raises(ValueError, match=r"LastWords\.keep"):
        names["LastWords"](keep=2.0)
    del sys.modules["last_words"]
