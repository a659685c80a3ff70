"""What was measured of methods, kept row by row in a file."""

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from benchmarks.files import write_json
from vtp_kernels.methods import Method

__all__ = ["Results", "label"]


class Results:
    """What was measured goes into the file row by row, so that a run that was cut off goes on.

    lists: names under which the file has measured rows when all is done.
    """

    def __init__(self, path: Path, lists: tuple[str, ...] = ("calibration", "rows")) -> None:
        self.path, self.lists, self.known = path, lists, {}
        if path.exists():
            stored = json.loads(path.read_text())
            for row in itertools.chain.from_iterable(stored[name] for name in lists):
                self.known[row["method"], row["split"], row["questions"]] = row

    def row(self, key: tuple[str, str, int], measure: Callable[[], dict]) -> dict:
        """The row of (method, split, questions), measured if it is not in the file."""
        if key not in self.known:
            self.known[key] = measure()
            *others, last = self.lists
            self.write({name: [] for name in others} | {last: list(self.known.values())})
        return self.known[key]

    def write(self, result: dict) -> None:
        write_json(self.path, result)


def label(method: Method) -> str:
    """The method as it is written on a command line, with what is not the default."""
    changed = []
    for field in fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            changed.append(f"{field.name}={text}")
    return f"{method.name}:{','.join(changed)}" if changed else method.name
