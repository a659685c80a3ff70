"""Kernels of an op that overlap give the bits of kernels that run one behind the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def digests(dependent_launch: str) -> dict[str, list[str]]:
    """By op and input, of each turn; the switch is read once a process."""
    folders = (HERE.parents[1], HERE.parent, HERE, *filter(None, [os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "VTP_DEPENDENT_LAUNCH": dependent_launch,
    }
    command = [sys.executable, "-c", "import alternate; alternate.main('cuda')"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_overlap_changes_no_bit():
    one_by_one, overlapping = digests("0"), digests("1")
    for name, turns in one_by_one.items():
        assert turns[:2] * (len(turns) // 2) == turns, name
    assert overlapping == one_by_one
