"""Fills the measured blocks of README.md and docs/ from the result files, and the lists of families
and of methods' short forms from the code: `python -m benchmarks.readme`.

A block stands between `<!-- name -->` and `<!-- /name -->`. `--check` only tells whether the pages
hold what the files say; a test runs it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.compiled import Row as CompiledRow
from benchmarks.compiled import table as compiled_table
from benchmarks.end_to_end import Row as EndToEndRow
from benchmarks.end_to_end import table as end_to_end_table
from benchmarks.harness import Timing, summary
from benchmarks.pocket_llava.evaluate import table as accuracy_table
from benchmarks.pocket_llava.leaderboard import table as leaderboard_table
from benchmarks.serving import Row as ServingRow
from benchmarks.serving import table as serving_table
from benchmarks.staged_serving import Row as StagedRow
from benchmarks.staged_serving import table as staged_table
from vtp_kernels.catalogue import catalogue
from vtp_kernels.contract.spec import FORMS
from vtp_kernels.demo import Comparison, Row, pocket_methods
from vtp_kernels.methods import Method, method_from_spec

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
FILES = {
    "accuracy.json": "intel-xeon-2-cores",
    "bench.json": "intel-xeon-2-cores",
    "compiled.json": "amd-epyc-2-cores",
    "demo.json": "intel-xeon-2-cores",
    "end_to_end.json": "amd-epyc-2-cores",
    "inflection.json": "amd-epyc-2-cores",
    "leaderboard.json": "amd-epyc-2-cores",
    "lvpruning.json": "intel-xeon-2-cores",
    "merging.json": "amd-epyc-2-cores",
    "visipruner.json": "intel-xeon-2-cores",
    "vllm.json": "intel-xeon-2-cores",
    "vllm_stages.json": "amd-epyc-2-cores",
}
BATCH = 8  # prompts, of the README's first table
SHOWN = {
    "dense": "no pruning",
    "Inflection": "**InflectionPruning**",
    "VisiPruner": "**VisiPruner**",
    "LVPruning": "**LVPruning**, mean of 3 trainings",
    "FastV": "FastV, half of the tokens",
    "random": "22 % of the tokens, by chance",
}


def summary_of_methods() -> str:
    """At the demo's settings: how often the answer is right, what is saved, and what that gains."""
    right = by_method()
    times = {
        row["method"]: row["speedup"]
        for row in _read("end_to_end.json")["rows"]
        if row["batch"] == BATCH
    }
    lines = [
        "| method | right answers, % | tokens left, % | prefill FLOPs saved, % "
        "| first token, times faster |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, shown in SHOWN.items():
        keys = ("exact_match", "visual_tokens_share", "prefill_flops_reduction")
        shares = " | ".join(f"{100 * right[name][key]:.1f}" for key in keys)
        lines.append(f"| {shown} | {shares} | {times[name]:.2f} |")
    return "\n".join(lines)


def by_method() -> dict[str, dict]:
    """The demo's methods, by their names there, and what was measured of each."""
    methods = pocket_methods()
    ratios = ",".join(map(str, methods["LVPruning"].ratios))
    right = {
        "dense": _row("accuracy.json", lambda name: name == "none"),
        "LVPruning": _row("lvpruning.json", lambda name: name.startswith(f"lvpruning, {ratios} ")),
    }
    files = {"Inflection": "inflection.json", "VisiPruner": "visipruner.json"}
    for name in ("Inflection", "VisiPruner", "FastV", "random"):
        file = files.get(name, "accuracy.json")
        right[name] = _row(file, lambda spec, name=name: _method(spec) == methods[name])
    return right


def compared() -> dict[str, dict]:
    """The three methods at the demo's settings, and the yardsticks of accuracy.json."""
    ours = {"Inflection": "InflectionPruning", "VisiPruner": "VisiPruner", "LVPruning": "LVPruning"}
    measured = by_method()
    yardsticks = {row["method"]: row for row in _read("accuracy.json")["rows"]}
    return yardsticks | {words: measured[name] for name, words in ours.items()}


def _row(file: str, wanted: Callable[[str], bool]) -> dict:
    """The one row of a result file whose method is the wanted one."""
    (row,) = (row for row in _read(file)["rows"] if wanted(row["method"]))
    return row


def _method(spec: str) -> Method | None:
    """What a row was made with; None for rows that are named in words."""
    try:
        return method_from_spec(spec)
    except ValueError:
        return None


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


def leaderboard() -> str:
    return leaderboard_table(_read("leaderboard.json")["board"])


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


def compiled() -> str:
    return compiled_table([CompiledRow(**row) for row in _read("compiled.json")["rows"]])


def vllm() -> str:
    return serving_table([ServingRow(**row) for row in _read("vllm.json")["rows"]])


def vllm_stages() -> str:
    return staged_table([StagedRow(**row) for row in _read("vllm_stages.json")["rows"]])


def ops() -> str:
    return summary([Timing(**row) for row in _read("bench.json")["rows"]])


def merging() -> str:
    """The ops that choose what differs, and merge the rest."""
    return summary([Timing(**row) for row in _read("merging.json")["rows"]])


def machines() -> str:
    """Every result file, and what it was measured on."""
    lines = [
        "| file | processor | cores | threads | torch | transformers |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for name, folder in FILES.items():
        stored = _read(name)
        versions = (stored.get("info") or stored)["versions"]
        machine = stored.get("machine") or {"cpu": stored["info"]["devices"]["cpu"]}
        counted = " | ".join(str(machine.get(key, "")) for key in ("cpu", "cores", "threads"))
        lines.append(
            f"| `{folder}/{name}` | {counted} | {versions['torch']} | {versions['transformers']} |"
        )
    return "\n".join(lines)


def families() -> str:
    """What is taken, by the pages of vtp_kernels.models.families; and below, by number, what does
    not go: families share these sentences, for which a column has no room."""
    head = "family", "such as", "tested around", "positions", "tower scores", "vLLM", "transformers"
    head = (*head, "but")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    limits: dict[str, int] = {}
    for name, family in catalogue().families.items():
        lists = (family[key] for key in ("text_models", "positions", "tower_scores", "vllm"))
        texts, positions, scores, vllm = (", ".join(words) for words in lists)
        but = sorted(limits.setdefault(limit, len(limits) + 1) for limit in family["limits"])
        lines.append(
            f"| `{name}` | {family['example']} | {texts} | {positions} | {scores or 'none'} "
            f"| {vllm} | {family['transformers']} | {', '.join(map(str, but))} |"
        )
    lines += ["", "But:", "", *(f"{number}. {limit}" for limit, number in limits.items())]
    return "\n".join(lines)


def forms() -> str:
    """What the command line takes for a method."""
    return f"```\n{FORMS}\n```"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": summary_of_methods, "demo": demo},
    "docs/results.md": {
        "accuracy": accuracy,
        "compiled": compiled,
        "end_to_end": end_to_end,
        "inflection": inflection,
        "lvpruning": lvpruning,
        "machines": machines,
        "merging": merging,
        "ops": ops,
        "visipruner": visipruner,
    },
    "docs/choosing_a_method.md": {"leaderboard": leaderboard},
    "docs/families.md": {"families": families},
    "docs/getting_started.md": {"forms": forms},
    "docs/vllm.md": {"vllm": vllm, "vllm_stages": vllm_stages},
}


def _read(name: str) -> dict:
    return json.loads((RESULTS / FILES[name] / name).read_text())


def filled(page: str, text: str) -> str:
    """The text of a page with every block replaced; a block it lacks is an error."""
    for name, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = make() + "\n"
        text, found = pattern.subn(lambda match, body=body: match[1] + body + match[2], text)
        if found != 1:
            raise ValueError(f"{page}: expected one block {name!r}, found {found}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 if a page is out of date"
    )
    args = parser.parse_args()
    outdated = 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = filled(page, text)
        if new == text:
            continue
        outdated = 1
        if args.check:
            print(f"{page} is out of date: run python -m benchmarks.readme", file=sys.stderr)
        else:
            path.write_text(new)
    return outdated if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
