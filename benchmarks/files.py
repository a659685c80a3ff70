"""Result files that are whole at any time."""

import json
import os
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Whoever is killed in here leaves the file as it was, or as it is to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)
