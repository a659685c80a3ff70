"""How the host launches kernels, tried on a stub of CUDA's runtime that refuses what a GPU does."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_launch_asks_for_what_a_gpu_wants_to_be_asked(tmp_path):
    folders = (HERE / "runtime_stub", HERE.parents[1] / "csrc")
    flags = ("-std=c++17", "-Wall", "-Wextra", *(f"-I{folder}" for folder in folders))
    program = tmp_path / "launch"
    command = ["g++", *flags, "-pthread", HERE / "launch.cpp", "-o", program]
    subprocess.run(command, check=True)

    def run(on: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], **environment}
        command = [program, *on]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    for result in (
        run("11"),
        run("11", VTP_DEPENDENT_LAUNCH="1", VTP_WGMMA="1"),
        run("01", VTP_DEPENDENT_LAUNCH="0"),
        run("10", VTP_WGMMA="0"),
    ):
        assert result.returncode == 0, result.stderr
    for switch in ("VTP_DEPENDENT_LAUNCH", "VTP_WGMMA"):
        assert f"{switch} must be 0 or 1, got no" in run("11", **{switch: "no"}).stderr
