"""Result files that are whole at any time."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`. Whoever is killed in here leaves that
    as it was, or as it is to be."""
    beside = path.with_name(f"{path.name}.new")
    yield beside
    os.replace(beside, path)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")
