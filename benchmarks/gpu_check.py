"""Everything that a GPU is needed for: `make gpu-check`.

    python -m benchmarks.gpu_check                      # all parts, one after another
    python -m benchmarks.gpu_check --part memcheck      # one part; the others' results stay

Parts: the tests marked `gpu`; tests/gpu/test_small_inputs.py (every op on every path, on inputs
small enough for tools that slow a kernel down 10 to 100 times) under compute-sanitizer's memcheck,
racecheck, initcheck and synccheck; the benchmarks. Writes benchmarks/results/<gpu>/check.json, and
bench.json beside it. Results of parts that ran before, of the same commit and build, are kept, so
that parts may run one by one where time is short. Exits with 2 where there is no GPU, with 1 if a
part failed or could not run.

What the sanitizer's tools are told, and why:

* Only kernels of this package are checked (`--kernel-name kns=`, a piece of the mangled name).
  Not so under initcheck: before version 2026.4 it takes what an unchecked kernel has written for
  uninitialised. It checks all kernels, and reports about others than ours are counted apart.
* torch allocates with cudaMalloc, tensor by tensor, under memcheck and initcheck
  (PYTORCH_NO_CUDA_MEMORY_CACHING), and every allocation is padded: in torch's cache, a neighbour's
  memory is valid memory, and old.
* `--check-device-heap no`: no kernel allocates, and the check loads all of torch's kernels at once.
* API errors are left to the tests, where they are exceptions.

Before version 2026.4 memcheck and initcheck report cp.async that fills with zeros, wrongly.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from vtp_kernels import reference
from vtp_kernels.machine import describe
from vtp_kernels.ops._dispatch import why_not

RESULTS = Path(__file__).parent / "results"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("tests", *TOOLS, "benchmarks")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
SMALL_INPUTS = "tests/gpu/test_small_inputs.py"
OUR_KERNELS = "_ZN3vtp4cuda"  # vtp::cuda::
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MOST_REPORTS = 1000


def main(argv: Iterable[str] = ()) -> int:
    args = _arguments(argv)
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    for op in reference.__all__:
        if reason := why_not(op, "native", "cuda"):
            print(f"gpu-check: {op}: {reason}; nothing was checked", file=sys.stderr)
            return 1
    folder = args.results.resolve() / slug(torch.cuda.get_device_name())
    described = {**describe(), "library": library()}
    ran = {}
    for part in args.part or PARTS:
        ran[part] = run_part(part, folder, args.timeout)
        result = write(folder / "check.json", {part: ran[part]}, described)  # after every part
    print("\n" + table(result["parts"]))
    return 0 if all(part["ok"] for part in ran.values()) else 1


def _arguments(argv: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="run this part alone; may be repeated"
    )
    parser.add_argument(
        "--timeout", type=float, default=560.0, help="seconds that one part may take"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    return parser.parse_args(list(argv))


def slug(name: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def library() -> str:
    """A digest of the native library: results of another build are not this one's."""
    file = importlib.import_module("vtp_kernels._C").__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


# --- parts --------------------------------------------------------------------------------------


def run_part(part: str, folder: Path, timeout: float) -> dict:
    """One part's result: ok, counts, last_line, seconds and command."""
    if part == "tests":
        return run(part, [*PYTEST, "tests"], timeout, count_tests)
    if part == "benchmarks":
        command = [sys.executable, "-m", "benchmarks", "--json", str(folder / "bench.json")]
        return run(part, command, timeout, lambda text: {})
    tool = sanitizer()
    if tool is None:
        return {"ok": False, "last_line": "compute-sanitizer not found; set CUDA_HOME"}
    uncached = UNCACHED if part in ("memcheck", "initcheck") else {}
    return run(
        part, sanitized(tool, part), timeout, lambda text: count_reports(part, text), uncached
    )


def sanitizer() -> str | None:
    """compute-sanitizer: on the path, or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    names = ("compute-sanitizer", f"{home}/bin/compute-sanitizer")
    return next(filter(None, map(shutil.which, names)), None)


def sanitized(tool: str, part: str) -> list[str]:
    """The command that runs the tests on small inputs under one of the sanitizer's tools."""
    command = [tool, "--tool", part, "--target-processes", "application-only"]
    command += ["--print-limit", str(MOST_REPORTS)]
    if part != "initcheck":
        command += ["--kernel-name", f"kns={OUR_KERNELS}"]
    if part == "memcheck":
        command += ["--padding", "512", "--report-api-errors", "no"]
    if part in ("memcheck", "initcheck"):
        command += ["--check-device-heap", "no"]
    return [*command, *PYTEST, SMALL_INPUTS]


def run(
    name: str,
    command: list[str],
    timeout: float,
    count: Callable[[str], dict],
    environment: dict[str, str] | None = None,
) -> dict:
    """Runs a command, shows its output as it comes and counts in it.

    It has failed if its exit status, one of the counts, or the time it took says so.
    """
    environment = environment or {}
    words = [*(f"{key}={value}" for key, value in environment.items()), *command]
    print(f"--- {name}: {' '.join(words)}", flush=True)
    start = time.monotonic()
    text, status, late = _output_of(command, timeout, {**os.environ, **environment})
    counts = count(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = f"stopped after {timeout:.0f} s" if late else lines[-1] if lines else "no output"
    return {
        "ok": status == 0 and not late and not failures(counts),
        "counts": counts,
        "last_line": last,
        "seconds": round(time.monotonic() - start, 1),
        "command": words,
    }


def _output_of(command: list[str], timeout: float, environment: dict) -> tuple[str, int, bool]:
    """(what it printed, its exit status, whether it was stopped). Ends what it started, too."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    clock = threading.Timer(timeout, stop)
    clock.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status = process.wait()
    finally:
        clock.cancel()
    return "".join(lines), status, stopped.is_set()


# --- counts -------------------------------------------------------------------------------------


def failures(counts: dict[str, int | None]) -> list[str]:
    """The counts that mean failure: anything wrong, a summary that is missing, nothing passed."""
    wrong = ("failed", "errors", "reports", "warnings", "unseen")
    return [
        name
        for name, number in counts.items()
        if number is None or (name in wrong and number) or (name == "passed" and not number)
    ]


def count_tests(text: str) -> dict[str, int | None]:
    """What pytest's last line says: "1 failed, 120 passed, 3 skipped, 9 deselected in 4.56s"."""
    names = ("passed", "failed", "skipped", "errors")
    summaries = [line for line in text.splitlines() if re.search(r"\bin \d+\.\d+s\b", line)]
    if not summaries:
        return dict.fromkeys(names)
    found = dict(
        (name, int(number)) for number, name in re.findall(r"(\d+) ([a-z]+)", summaries[-1])
    )
    found["errors"] = found.pop("error", 0) + found.pop("errors", 0)
    return {name: found.get(name, 0) for name in names}


def count_reports(tool: str, text: str) -> dict[str, int | None]:
    """The tests' counts and the tool's, of our kernels; None: there was no summary.

    Under initcheck `others` are reports of other kernels, `unseen` those it did not print.
    """
    counts = count_tests(text)
    if tool == "racecheck":
        pattern = r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)"
        found = re.search(pattern, text)
        counts["reports"], counts["warnings"] = map(int, found.groups()) if found else (None, None)
        return counts
    found = re.search(r"ERROR SUMMARY: (\d+) errors?$", text, re.MULTILINE)
    counts["reports"] = int(found[1]) if found else None
    if tool == "initcheck" and found:
        shown = [report for report in _reports(text) if "Uninitialized" in report]
        counts["unseen"] = max(0, int(found[1]) - MOST_REPORTS)
        counts["reports"] = sum(map(_is_ours, shown))
        counts["others"] = len(shown) - counts["reports"]
    return counts


def _reports(text: str) -> list[str]:
    """The sanitizer's reports: its lines from one that says what, to the next bare =========."""
    return re.findall(r"^========= \S.*\n(?:^=========  .*\n)*", text, re.MULTILINE)


def _is_ours(report: str) -> bool:
    """Whether a kernel of ours was running. Host frames do not count: our library calls torch's."""
    device = report.split("Saved host backtrace")[0]
    return "vtp::cuda::" in device or OUR_KERNELS in device


# --- the file -----------------------------------------------------------------------------------


def write(path: Path, parts: dict, described: dict) -> dict:
    """Adds parts to the file; what it holds of another commit, build or machine is dropped.

    `ok` is true once every part has run and is.
    """
    kept = {}
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(name) == value for name, value in described.items()):
            kept = before["parts"]
    parts = {**kept, **parts}
    ordered = {name: parts[name] for name in PARTS if name in parts}
    missing = [name for name in PARTS if name not in parts]
    ok = not missing and all(part["ok"] for part in ordered.values())
    result = {"ok": ok, "missing": missing, "parts": ordered, **described}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(parts: dict) -> str:
    """One line a part; parts that have not run are named."""
    lines = []
    for name in PARTS:
        part = parts.get(name, {"last_line": ""})
        state = {True: "ok", False: "FAILED", None: "not run"}[part.get("ok")]
        lines.append(f"{name:<12}{state:<9}{part['last_line']}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
