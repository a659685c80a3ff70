"""Lets pages link to files of the repository outside docs/, as they do on a code host.

Every such file that a page links to becomes one of the site, under repository/, and the links go
there: `](../csrc/traffic.md)` in docs/, `](docs/wheels.md)` in the README. A link to nothing stays
as it is, and the strict build names it. A page that would load something from the network ends the
build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository/"
LINK = re.compile(r'(\]\(|(?:src|href)=")((?!\w+:|#)[^)"#\s]+)')
LOADED = re.compile(r'<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*')


def on_files(files, config):
    """Adds what pages link to, and what these link to in turn."""
    seen = set()
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for link in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
            path = _path(page, link[2])
            if path.startswith("docs/") or path in seen or not (ROOT / path).is_file():
                continue
            seen.add(path)
            file = File.generated(config, OUTSIDE + path, abs_src_path=str(ROOT / path))
            files.append(file)
            if file.is_documentation_page():
                pages.append(path)
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links of the repository into links of the site."""
    uri = page.file.src_uri
    here = uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"

    def moved(link):
        path = _path(here, link[2])
        if not (ROOT / path).is_file():
            return link[0]
        target = path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path
        return link[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def on_post_page(output, page, config):
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load from the network: {found[0]}")
    return output


def _path(page, link):
    """Where a link of a page leads, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
