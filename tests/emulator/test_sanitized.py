"""The kernels under AddressSanitizer and UBSan: no access out of bounds, none misaligned."""

import json
import subprocess
import sys

import pytest

from emulator import build

MEMORY_ERRORS = {
    "shared_overrun": "heap-buffer-overflow",
    "dynamic_overrun": "heap-buffer-overflow",
    "global_write": "heap-buffer-overflow",
    "global_read": "heap-buffer-overflow",
    "async_read": "heap-buffer-overflow",
    "misaligned_load": "misaligned address",
    "cluster_ends_before": "use-after-poison",
    "stack_overflow": "stack-overflow",
}


@pytest.fixture(scope="module")
def run_sanitized():
    """A function that runs a script of this folder with the sanitized build."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    build.build("sanitized")
    environment = {**build.sanitized_environment(), "PYTHONPATH": str(build.HERE.parent)}

    def run(script, *arguments):
        command = [sys.executable, build.HERE / script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_planted_memory_errors_are_reported_with_their_line(run_sanitized):
    run = run_sanitized("planted.py", "sanitized", *MEMORY_ERRORS, "neighbour_is_right")
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    lines = (build.HERE / "defects.cpp").read_text().splitlines()
    for name, error in MEMORY_ERRORS.items():
        (line,) = (i for i, text in enumerate(lines, 1) if text.endswith(f"// defect: {name}"))
        assert error in reports[name]
        assert f"defects.cpp:{line}" in reports[name], reports[name]
    assert reports["neighbour_is_right"] == ""


def test_every_op_is_clean(run_sanitized, draw):
    run = run_sanitized("cases.py", "sanitized", str(draw.integer(0, 2**31)))
    where = run.stdout.strip().rpartition("\n")[2]
    assert run.returncode == 0, f"{where}:\n{run.stderr[:8000]}"
