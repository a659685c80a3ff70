"""`python -m benchmarks [op ...]`: times the ops beside what would be used instead.

Writes a Markdown table to the screen and, with --json, the timings, the machine and the versions.
"""

import argparse
import dataclasses
import importlib
from pathlib import Path

import torch

from benchmarks import chart, harness
from vtp_kernels import reference

OPS = tuple(reference.__all__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as one more rival (takes long)"
    )
    parser.add_argument("--json", type=Path, help="write the timings, machine and versions here")
    parser.add_argument("--plot", type=Path, help="draw the ratios here, as PNG")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    timings, bandwidth = [], harness.copy_bandwidth(args.device)
    for op in args.ops or OPS:
        cases = importlib.import_module(f"benchmarks.{op}").cases(args.device)
        timings += harness.measure(cases, args.device, args.turns, bandwidth, args.compile)
    print(harness.table(timings), harness.summary(timings), sep="\n\n")
    if args.plot:
        chart.draw(timings, args.plot)
    if args.json:
        rows = [dataclasses.asdict(timing) for timing in timings]
        harness.write(args.json, {"rows": rows, "copy_bytes_per_second": bandwidth})


if __name__ == "__main__":
    main()
