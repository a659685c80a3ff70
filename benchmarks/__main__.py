"""`python -m benchmarks [op ...]`: times the ops beside what would be used instead.

Writes a Markdown table to the screen and, with --json, the timings, the machine and the versions:
after every cell, so that whoever stops it loses the cell that was being measured. A cell whose
check fails is written down as failed, and the others are measured all the same; the exit status is
1 then. --resume goes on where a run of the same sources and library was stopped.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import chart, goals, harness, installed
from benchmarks.files import write_json
from benchmarks.harness import Case, Timing
from benchmarks.identity import found_before, identity
from benchmarks.lost_device import DEVICE_LOST, why_lost
from vtp_kernels import reference, terminal
from vtp_kernels.machine import describe

OPS = tuple(reference.__all__)


class Results:
    """What was measured, in a file that is whole at any time."""

    def __init__(self, path: Path | None, device: str, resume: bool) -> None:
        self.path = path
        self.rows: list[Timing] = []
        self.failed: list[dict] = []
        self.header = {"identity": identity(), "device": device, **describe()}
        before = found_before(path, self.header) if resume else None
        if before is not None:
            self._read(before)

    def _read(self, before: dict) -> None:
        self.rows = [Timing(**row) for row in before["rows"]]
        self.failed = before["failed"]
        if before["running"] is not None:
            self.failed.append(before["running"] | {"error": "the process ended in this cell"})

    def has(self, case: Case) -> bool:
        cells = [(row.op, row.shape) for row in self.rows]
        cells += [(cell["op"], cell["shape"]) for cell in self.failed]
        return (case.op, case.shape) in cells

    def write(self, running: Case | None = None) -> None:
        if self.path is None:
            return
        cell = None if running is None else {"op": running.op, "shape": running.shape}
        rows = [dataclasses.asdict(timing) for timing in self.rows]
        found = {"rows": rows, "failed": self.failed, "running": cell}
        write_json(self.path, {**found, **self.header, "no_rivals": installed.why_not})


def measure(cases: list[Case], results: Results, args: argparse.Namespace) -> int:
    """The exit status."""
    bandwidth = harness.copy_bandwidth(args.device)
    results.header |= {
        "copy_bytes_per_second": bandwidth,
        "launch_gap_seconds": harness.launch_gap(args.device),
    }
    for case in tqdm([case for case in cases if not results.has(case)], disable=None):
        results.write(running=case)
        try:
            timing = harness.measure(
                case, args.device, args.turns, bandwidth, args.compile, args.alone
            )
        except Exception as error:  # of any kind: the other cells are worth as much
            said = f"{type(error).__name__}: {error}"
            print(f"failed: {case.op}, {case.shape}: {said}", file=sys.stderr)
            results.failed.append({"op": case.op, "shape": case.shape, "error": said[:2000]})
            if why_lost() is not None:
                results.write()
                return DEVICE_LOST
        else:
            results.rows.append(timing)
    results.write()
    return int(bool(results.failed))


def all_cases(args: argparse.Namespace) -> Iterator[Case]:
    ops = args.ops or OPS
    for op in dict.fromkeys((*(x for x in args.order if x in ops), *ops)):
        yield from importlib.import_module(f"benchmarks.{op}").cases(args.device)


def arguments(argv: Sequence[str] | None, name: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument(
        "--order",
        type=lambda text: text.split(","),
        default=[],
        metavar="OP,OP,...",
        help="ops that are measured before the others, in this order",
    )
    parser.add_argument("--goals", action="store_true", help="the cells that carry goals, alone")
    parser.add_argument("--tiny", action="store_true", help="tiny --goals: a rehearsal")
    parser.add_argument("--alone", action="store_true", help="time no rivals; they check, as ever")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as one more rival (takes long)"
    )
    parser.add_argument("--json", type=Path, help="write the timings, machine and versions here")
    parser.add_argument("--resume", action="store_true", help="measure what --json lacks")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as PNG")
    args = parser.parse_args(argv)
    if unknown := {*args.ops, *args.order} - set(OPS):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    if args.goals and (args.ops or args.order):
        parser.error("--goals: these cells have an order of their own, and are measured together")
    if args.alone and (args.compile or args.plot):
        parser.error("--alone: --compile and --plot are about rivals")
    if args.tiny and not args.goals:
        parser.error("--tiny: of --goals alone")
    if args.resume and args.json is None:
        parser.error("--resume: needs --json, the file to go on with")
    if args.plot:
        chart.check_matplotlib()  # now, and not when all is measured
    return args


def main(argv: Sequence[str] | None = None, name: str | None = None) -> int:
    """`name` is what the program is called in its help."""
    args = arguments(argv, name)
    results = Results(args.json, args.device, args.resume)
    cases = goals.cases(args.device, args.tiny) if args.goals else list(all_cases(args))
    status = measure(cases, results, args)
    timings = results.rows
    if timings:
        terminal.show_markdown(harness.table(timings))
    if timings and not args.alone:
        print()
        terminal.show_markdown(harness.summary(timings))
        if args.plot:
            chart.draw(timings, args.plot)
    for cell in results.failed:
        print(f"failed: {cell['op']}, {cell['shape']}: {cell['error']}")
    return status


if __name__ == "__main__":
    sys.exit(main())
