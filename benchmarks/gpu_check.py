"""Everything that a GPU is needed for, in one go: `make gpu-check`.

Runs the tests marked `gpu`, the same tests under compute-sanitizer's memcheck, and the benchmarks;
writes benchmarks/results/<gpu>/check.json and bench.json. Exits with 2 where there is no GPU, and
with 1 if anything failed or a part could not run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from vtp_kernels.machine import describe

RESULTS = Path(__file__).parent / "results"
TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]


def run(name: str, command: list[str]) -> dict:
    """Runs one part; its output is shown as it comes, and its last line kept."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return {"ok": process.wait() == 0, "last_line": last}


def sanitizer() -> str | None:
    """compute-sanitizer, on the path or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = RESULTS / gpu
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"tests": run("tests", TESTS)}
    if tool := sanitizer():
        command = [tool, "--tool", "memcheck", "--error-exitcode", "1", *TESTS]
        parts["memcheck"] = run("memcheck", command)
    else:
        parts["memcheck"] = {"ok": False, "last_line": "compute-sanitizer not found; set CUDA_HOME"}
    bench = [sys.executable, "-m", "benchmarks", "--json", str(folder / "bench.json")]
    parts["benchmarks"] = run("benchmarks", bench)

    result = {"ok": all(part["ok"] for part in parts.values()), "parts": parts, **describe()}
    (folder / "check.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, part in parts.items():
        print(f"{name:<12}{'ok' if part['ok'] else 'FAILED':<8}{part['last_line']}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
