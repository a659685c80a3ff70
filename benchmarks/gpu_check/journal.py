"""What happened, one line of JSON a test: a process that is killed has lost its last line at most.

Many processes append to one file, so a line is written with one call. What can be told of a step,
its JUnit file too, is made from these lines, whoever wrote them and whether or not they ended well.
"""

import json
import os
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.files import replacing

ENDED = ("passed", "failed", "skipped", "crashed", "hung", "stopped")
DONE = ("passed", "skipped")  # is not run again by a later call
LONGEST = 4000  # characters of a message


class Journal:
    """Appends lines, and reads those that it has not read yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def add(self, **entry) -> None:
        line = json.dumps({"time": round(time.time(), 2), **entry}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def mend(self) -> None:
        """Ends a line in which a process was killed; `new` passes over it."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def new(self) -> list[dict]:
        """The lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # see mend
                continue
        return found


def outcomes(entries: list[dict]) -> dict[str, dict]:
    """Test -> the last that was said of it. One that began and did not end is in it, too."""
    return {entry["test"]: entry for entry in entries if "test" in entry}


def done(entries: list[dict]) -> dict[str, str]:
    """Test -> the process that ran it, of those that are not run again."""
    found = outcomes(entries).items()
    return {test: entry["worker"] for test, entry in found if entry["outcome"] in DONE}


def collected(entries: list[dict]) -> int | None:
    """How many tests there are; None where no process came to count them."""
    return max((entry["collected"] for entry in entries if "collected" in entry), default=None)


def counts(entries: list[dict]) -> dict[str, int | None]:
    """Of tests: how many there are, and how each ended, `left` those that did not run."""
    ended = [entry["outcome"] for entry in outcomes(entries).values()]
    found = {outcome: ended.count(outcome) for outcome in ENDED}
    total = collected(entries)
    left = None if total is None else max(0, total - sum(found.values()))
    return {"collected": total, **found, "left": left}


def write_junit(path: Path, step: str, entries: list[dict]) -> None:
    """The step as a JUnit file, whatever processes it ran in."""
    found = outcomes(entries)
    states = [entry["outcome"] for entry in found.values()]
    wrong = [state for state in states if state not in ("passed", "skipped", "failed")]
    suite = ElementTree.Element(
        "testsuite",
        name=step,
        tests=str(len(found)),
        failures=str(states.count("failed")),
        errors=str(len(wrong)),
        skipped=str(states.count("skipped")),
        time=f"{sum(entry.get('seconds', 0) for entry in found.values()):.3f}",
    )
    for test, entry in found.items():
        file, _, name = test.partition("::")
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=file.removesuffix(".py").replace("/", "."),
            name=name or file,
            time=f"{entry.get('seconds', 0):.3f}",
        )
        if entry["outcome"] != "passed":
            kind = {"failed": "failure", "skipped": "skipped"}.get(entry["outcome"], "error")
            text = entry.get("message", "")
            first = text[:200] if kind != "error" else f"{entry['outcome']}: {text[:200]}"
            said = ElementTree.SubElement(case, kind, message=first)
            said.text = text
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    _only_xml(whole)
    with replacing(path) as beside:
        ElementTree.ElementTree(whole).write(beside, encoding="utf-8", xml_declaration=True)


def _only_xml(element: ElementTree.Element) -> None:
    """Takes out the control characters that XML cannot hold, such as those of colors."""
    for part in element.iter():
        part.text = part.text and "".join(x for x in part.text if x >= " " or x in "\n\t")
        for name, value in part.attrib.items():
            part.attrib[name] = "".join(x for x in value if x >= " " or x in "\n\t")
