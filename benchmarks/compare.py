"""Whether ops got slower: `python -m benchmarks.compare out/bench.json`, or `make bench-compare`.

The baseline is the committed result file of the same kind of machine (processor, cores, GPU). What
is compared is how many times faster an op was than the best of its rivals in the same run, of those
that both runs had, since times alone differ from day to day. An op got slower in a cell if that
ratio fell by more than the tolerance, and even the best turn of the new run stays below the old
median. Exits with 1 then, and with 2 where there is no baseline.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import Timing

RESULTS = Path(__file__).parent / "results"
KIND = ("cpu", "cores", "gpu")


def baseline(machine: dict, results: Path = RESULTS) -> Path | None:
    """The committed bench.json of that kind of machine."""
    for path in sorted(results.glob("*/bench.json")):
        stored = json.loads(path.read_text())["machine"]
        if all(stored[key] == machine[key] for key in KIND):
            return path
    return None


def timings(path: Path) -> dict[tuple[str, str], Timing]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["op"], row["shape"]): Timing(**row) for row in rows}


def ratio(timing: Timing, rivals: set[str]) -> tuple[str, float]:
    """The best of these rivals, and how many times faster than it the op is."""
    return min(((name, timing.speedup[name]) for name in sorted(rivals)), key=lambda item: item[1])


def compare(old: dict, new: dict, tolerance: float) -> tuple[list[str], bool]:
    """(a line for every cell that changed by more than the tolerance, whether any got slower)."""
    lines, slower = [], False
    for key in old.keys() & new.keys():
        rivals = old[key].speedup.keys() & new[key].speedup.keys()
        if not rivals:
            lines.append(f"no rival in common: {key[0]}, {key[1]}")
            continue
        (_, before), (rival, after) = ratio(old[key], rivals), ratio(new[key], rivals)
        change = after / before - 1
        best = new[key].spread[rival][1]
        worse = change < -tolerance and best < before
        slower |= worse
        if worse or change > tolerance:
            word = "slower" if worse else "faster"
            lines.append(f"{word}: {key[0]}, {key[1]}: {before:.2f} -> {after:.2f} times {rival}")
    lines += [f"new: {op}, {shape}" for op, shape in new.keys() - old.keys()]
    lines += [f"not measured: {op}, {shape}" for op, shape in old.keys() - new.keys()]
    return sorted(lines), slower


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="what `make bench` wrote")
    parser.add_argument("--tolerance", type=float, default=0.15, help="share of the old ratio")
    args = parser.parse_args()
    machine = json.loads(args.result.read_text())["machine"]
    path = baseline(machine)
    if path is None:
        kind = ", ".join(f"{key} {machine[key]}" for key in KIND)
        print(f"bench-compare: no result file for {kind} in {RESULTS}", file=sys.stderr)
        return 2
    lines, slower = compare(timings(path), timings(args.result), args.tolerance)
    print(f"beside {path}:", *(lines or ["no change"]), sep="\n")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
