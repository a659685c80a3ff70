"""compute-sanitizer: what its tools are told, and what they report.

* Only kernels of this package are checked (`--kernel-name kns=`, a piece of the mangled name).
  Not so under initcheck: before version 2026.4 it takes what an unchecked kernel has written for
  uninitialised. It checks all kernels, and reports about others than ours are counted apart.
* torch allocates with cudaMalloc, tensor by tensor, under memcheck and initcheck
  (PYTORCH_NO_CUDA_MEMORY_CACHING), and every allocation is padded: in torch's cache, a neighbour's
  memory is valid memory, and old.
* `--check-device-heap no`: no kernel allocates, and the check loads all of torch's kernels at once.
* API errors are left to the tests, where they are exceptions.
* Before version 2026.4 memcheck and initcheck report cp.async that fills with zeros, wrongly. One
  op has it, and is left out there.
"""

import os
import re
import shutil
import subprocess

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUR_KERNELS = "_ZN3vtp4cuda"  # vtp::cuda::, mangled
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MOST_REPORTS = 1000
ZERO_FILLING = "passive_attention"  # the op with cp.async that fills with zeros
RIGHT_ABOUT_ZERO_FILLING = (2026, 4)


def find(name: str = "compute-sanitizer", path: str | None = None) -> str | None:
    """A tool of the CUDA toolkit: on the path, or in the toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=path) or shutil.which(f"{home}/bin/{name}")


def version(program: str) -> tuple[int, ...]:
    """(2025, 3, 0, 0), of "Version 2025.3.0.0 (build 123) (public-release)". () if it says none."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"Version (\d+(?:\.\d+)+)", done.stdout)
    return tuple(map(int, found[1].split("."))) if found else ()


def left_out(tool: str, known: tuple[int, ...]) -> str | None:
    """The op whose reports of this tool, at this version, mean nothing."""
    misled = tool in ("memcheck", "initcheck") and known < RIGHT_ABOUT_ZERO_FILLING
    return ZERO_FILLING if misled else None


def prefix(program: str, tool: str) -> list[str]:
    """What stands before a command that is to run under the tool."""
    command = [program, "--tool", tool, "--target-processes", "application-only"]
    command += ["--print-limit", str(MOST_REPORTS)]
    if tool != "initcheck":
        command += ["--kernel-name", f"kns={OUR_KERNELS}"]
    if tool == "memcheck":
        command += ["--padding", "512", "--report-api-errors", "no"]
    if tool in ("memcheck", "initcheck"):
        command += ["--check-device-heap", "no"]
    return command


def environment(tool: str) -> dict[str, str]:
    return UNCACHED if tool in ("memcheck", "initcheck") else {}


def reports(tool: str, text: str) -> dict[str, int | None]:
    """The tool's counts of one process, of our kernels; None: there was no summary.

    Under racecheck `reports` are errors. Under initcheck `others` are reports of other kernels,
    `unseen` those it did not print.
    """
    if tool == "racecheck":
        pattern = r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)"
        found = re.search(pattern, text)
        errors, warnings = map(int, found.groups()) if found else (None, None)
        return {"reports": errors, "warnings": warnings}
    found = re.search(r"ERROR SUMMARY: (\d+) errors?$", text, re.MULTILINE)
    if tool != "initcheck" or not found:
        return {"reports": int(found[1]) if found else None}
    shown = [report for report in _reports(text) if "Uninitialized" in report]
    ours = sum(map(_is_ours, shown))
    return {
        "reports": ours,
        "others": len(shown) - ours,
        "unseen": max(0, int(found[1]) - MOST_REPORTS),
    }


def shown(text: str) -> int:
    """Reports of our kernels in the output of a process that was stopped before its summary."""
    return sum(map(_is_ours, _reports(text)))


def _reports(text: str) -> list[str]:
    """The sanitizer's reports: its lines from one that says what, to the next bare =========."""
    return re.findall(r"^========= \S.*\n(?:^=========  .*\n)*", text, re.MULTILINE)


def _is_ours(report: str) -> bool:
    """Whether a kernel of ours was running. Host frames do not count: our library calls torch's."""
    device = report.split("Saved host backtrace")[0]
    return "vtp::cuda::" in device or OUR_KERNELS in device
