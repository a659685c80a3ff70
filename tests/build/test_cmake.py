"""CMake by itself: torch-free libraries, installed, and found by a C++ program that uses them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSUMER = Path(__file__).with_name("consumer")


def find_tool(name: str) -> str:
    # A virtual environment's own tools count even if it was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or pytest.skip(f"no {name} here")


def cmake(*arguments: str | Path) -> str:
    """Runs CMake with no Python to be found: what it makes here needs none."""
    command = [find_tool("cmake"), *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout


def configure(source: Path, folder: Path, **options: str | Path) -> None:
    options["CMAKE_MAKE_PROGRAM"] = find_tool("ninja")
    defined = [f"-D{name}={value}" for name, value in options.items()]
    cmake("-S", source, "-B", folder, "-G", "Ninja", *defined)


def test_a_program_uses_the_installed_kernels(tmp_path):
    library, installed, program = (tmp_path / name for name in ("library", "installed", "program"))
    # Debug compiles fast. Nothing of Python or torch may be asked for.
    configure(ROOT, library, CMAKE_BUILD_TYPE="Debug", Python_EXECUTABLE="/nonexistent")
    cmake("--build", library)
    cmake("--install", library, "--prefix", installed)
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"include/vtp_kernels/arguments.h", "include/vtp_kernels/cpu/ops.h"} <= files
    assert [name for name in files if name.endswith("libvtp_kernels_cpu.a")]

    # Moved away, it is found all the same.
    moved = installed.rename(tmp_path / "moved")
    configure(CONSUMER, program, CMAKE_PREFIX_PATH=moved)
    cmake("--build", program)
    output = subprocess.check_output([program / "consumer"], text=True)
    assert output == "2 of 4: 1 3\n"
