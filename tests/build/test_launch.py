"""How the host launches kernels, tried on a stub of CUDA's runtime that refuses what a GPU does."""

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
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
