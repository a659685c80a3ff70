"""Fills the README's measured blocks from the result files: `python -m benchmarks.readme`.

A block stands between `<!-- name -->` and `<!-- /name -->`. `--check` only tells whether the README
holds what the files say; a test runs it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.end_to_end import Row as EndToEndRow
from benchmarks.end_to_end import table as end_to_end_table
from benchmarks.harness import Timing, summary
from benchmarks.pocket_llava.evaluate import table as accuracy_table
from benchmarks.serving import Row as ServingRow
from benchmarks.serving import table as serving_table
from vtp_kernels.demo import Comparison, Row

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
FILES = {
    "accuracy.json": "intel-xeon-2-cores",
    "bench.json": "intel-xeon-2-cores",
    "demo.json": "intel-xeon-2-cores",
    "end_to_end.json": "amd-epyc-2-cores",
    "inflection.json": "amd-epyc-2-cores",
    "lvpruning.json": "intel-xeon-2-cores",
    "visipruner.json": "intel-xeon-2-cores",
    "vllm.json": "intel-xeon-2-cores",
}


def accuracy() -> str:
    """The three methods, and the yardsticks, on the same 2,000 questions."""
    dense, *yardsticks = _read("accuracy.json")["rows"]
    _, inflection, *_ = _read("inflection.json")["rows"]
    # of one or two settings, the last is the one that loses less
    *_, visipruner = (
        row for row in _read("visipruner.json")["rows"] if row["method"].startswith("visipruner")
    )
    _, lvpruning, *_ = _read("lvpruning.json")["rows"]
    ours = {
        "dense": dense,
        "**InflectionPruning**": inflection,
        "**LVPruning**, 3 trainings": lvpruning,
        "**VisiPruner**": visipruner,
    }
    rows = [row | {"method": name} for name, row in ours.items()] + yardsticks
    if len({row["questions"] for row in rows}) != 1:
        raise ValueError(f"{[(row['method'], row['questions']) for row in rows]}: expected one set")
    return accuracy_table(rows)


def visipruner() -> str:
    return accuracy_table(_read("visipruner.json")["rows"])


def lvpruning() -> str:
    return accuracy_table(_read("lvpruning.json")["rows"])


def inflection() -> str:
    return accuracy_table(_read("inflection.json")["rows"])


def demo() -> str:
    stored = _read("demo.json")
    rows = [Row(**row) for row in stored["rows"]]
    return f"```\n{Comparison(stored['prompts'], rows, stored['expected'])}\n```"


def end_to_end() -> str:
    return end_to_end_table([EndToEndRow(**row) for row in _read("end_to_end.json")["rows"]])


def vllm() -> str:
    return serving_table([ServingRow(**row) for row in _read("vllm.json")["rows"]])


def ops() -> str:
    return summary([Timing(**row) for row in _read("bench.json")["rows"]])


def machine() -> str:
    methods = ("inflection.json", "lvpruning.json", "visipruner.json")
    described = [_read(x) for x in ("accuracy.json", "bench.json", "end_to_end.json", *methods)]
    where = {
        f"{d['machine']['cpu']}, {d['machine']['cores']} cores, torch {d['versions']['torch']}, "
        f"transformers {d['versions']['transformers']}"
        for d in described
    }
    return "\n".join(sorted(where))


BLOCKS = {
    "accuracy": accuracy,
    "demo": demo,
    "end_to_end": end_to_end,
    "inflection": inflection,
    "ops": ops,
    "lvpruning": lvpruning,
    "machine": machine,
    "visipruner": visipruner,
    "vllm": vllm,
}


def _read(name: str) -> dict:
    return json.loads((RESULTS / FILES[name] / name).read_text())


def filled(text: str) -> str:
    """The README with every block replaced; a block it lacks is an error."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make() + "\n"
        text, found = pattern.subn(lambda match, body=body: match[1] + body + match[2], text)
        if found != 1:
            raise ValueError(f"README.md: expected one block {name!r}, found {found}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 if it is out of date"
    )
    args = parser.parse_args()
    text = README.read_text()
    if filled(text) == text:
        return 0
    if args.check:
        print("README.md is out of date: run python -m benchmarks.readme", file=sys.stderr)
        return 1
    README.write_text(filled(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
