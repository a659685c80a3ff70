"""Everything that a GPU is needed for, in one call of a few minutes.

    python -m benchmarks.gpu_check                                # 480 s
    python -m benchmarks.gpu_check --budget 300 --out out/gpu     # shorter
    python -m benchmarks.gpu_check --resume                       # goes on with what is left
    python -m benchmarks.gpu_check --rehearse                     # the same plan without a GPU

It needs torch, Triton, transformers, numpy and pytest, and nothing is downloaded: on a machine
without a network it runs from a checkout, with vtp_kernels/_C.abi3.so brought along; where that is
missing or has no code for the GPU, it is built there. Which steps there are, and why in this
order: plan.py. What comes back, and is whole whenever the process is killed: check.py.

Exits with 0 if all of it ran and is right, with 2 where there is no GPU, else with 1.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_check.check import Check, Machine
from benchmarks.gpu_check.plan import STEPS, Step
from benchmarks.identity import ROOT

OUT = ROOT / "out" / "gpu-check"
MACHINE = STEPS[0].name
LAST = 4.0  # seconds, in which the archive is packed


def main(argv: Iterable[str] = ()) -> int:
    args = arguments(argv)
    end = time.monotonic() + args.budget
    names = [step.name for step in STEPS]
    check = Check(args.out.resolve(), Machine(args.rehearse), names, args.budget, args.resume)
    try:
        return run(check, STEPS, end - LAST)
    finally:
        check.close()


def arguments(argv: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=float, default=480.0, metavar="SECONDS", help="for all of it"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder of results")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds, and go on with the rest"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, with a few tests and tiny shapes"
    )
    args = parser.parse_args(list(argv))
    if args.budget < 30:
        parser.error("--budget: expected at least 30 seconds")
    return args


def run(check: Check, plan: tuple[Step, ...], end: float) -> int:
    left = [step for step in plan if step.every_call or not check.is_ok(step.name)]
    total, began, used = sum(step.share for step in left), time.monotonic(), 0.0
    for step in left:
        used += step.share
        now = time.monotonic()
        if now >= end:
            break
        until = min(end, max(began + (end - began) * used / total, now + step.least))
        print(f"--- {step.name}: {step.what} ({until - now:.0f} s)", flush=True)
        started = time.monotonic()
        try:
            result = step.run(check, step.name, until)
        except Exception as error:  # of any kind: the next step goes on
            result = {
                "state": "FAILED",
                "said": f"gpu-check itself: {type(error).__name__}: {error}",
            }
        result["seconds"] = round(time.monotonic() - started, 1)
        check.finish(step.name, result)
        print(f"    {result['state']}: {result['said']}", flush=True)
        if step.name == MACHINE and result["state"] != "ok":
            print(f"gpu-check: {result['said']}", file=sys.stderr)
            return 2 if check.found.get("device", "") is None else 1
    print("\n" + table(check.results, plan))
    return 0 if check.ok() else 1


def table(results: dict[str, dict], plan: tuple[Step, ...]) -> str:
    """One line a step; those that have not run are named."""
    rows = []
    for step in plan:
        found = results.get(step.name, {"state": "not run", "said": step.what})
        seconds = f"{found['seconds']:.0f} s" if "seconds" in found else ""
        rows.append(f"{step.name:<26}{found['state']:<12}{seconds:>6}  {found['said']}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
