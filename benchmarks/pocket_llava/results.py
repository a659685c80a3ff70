"""What was measured of methods, kept row by row in a file."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from vtp_kernels.methods import Method

__all__ = ["Results", "label"]


class Results:
    """What was measured goes into the file row by row, so that a run that was cut off goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        if path.exists():
            stored = json.loads(path.read_text())
            for row in stored["calibration"] + stored["rows"]:
                self.known[row["method"], row["split"], row["questions"]] = row

    def row(self, key: tuple[str, str, int], measure: Callable[[], dict]) -> dict:
        """The row of (method, split, questions), measured if it is not in the file."""
        if key not in self.known:
            self.known[key] = measure()
            self.write({"calibration": [], "rows": list(self.known.values())})
        return self.known[key]

    def write(self, result: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=2) + "\n")


def label(method: Method) -> str:
    """The method as it is written on a command line, with what is not the default."""
    changed = []
    for field in fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            changed.append(f"{field.name}={text}")
    return f"{method.name}:{','.join(changed)}" if changed else method.name
