"""CMake by itself: torch-free libraries, installed, and found by a C++ program that uses them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_generation import find_nvcc

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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The build folder of all tests: the CPU kernels are compiled once."""
    return tmp_path_factory.mktemp("library")


def install(library: Path, folder: Path, **options: str | Path) -> Path:
    """Where the libraries are installed, moved away from where they were installed to."""
    installed = folder / "installed"
    # Nothing of Python or torch may be asked for. Debug compiles fast.
    fixed = {"Python_EXECUTABLE": "/nonexistent", "CMAKE_BUILD_TYPE": "Debug"}
    configure(ROOT, library, **fixed, **{"VTP_CUDA_ARCHS": ""} | options)
    cmake("--build", library)
    cmake("--install", library, "--prefix", installed)
    return installed.rename(folder / "moved")


def build_consumer(folder: Path, installed: Path) -> Path:
    configure(CONSUMER, folder / "program", CMAKE_PREFIX_PATH=installed)
    cmake("--build", folder / "program")
    return folder / "program"


def test_a_program_uses_the_installed_kernels(library, tmp_path):
    installed = install(library, tmp_path)
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"include/vtp_kernels/arguments.h", "include/vtp_kernels/cpu/ops.h"} <= files
    assert [name for name in files if name.endswith("libvtp_kernels_cpu.a")]
    program = build_consumer(tmp_path, installed)
    assert subprocess.check_output([program / "consumer"], text=True) == "2 of 4: 1 3\n"
    assert not (program / "cuda_consumer").exists()


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
def test_a_program_uses_the_installed_cuda_kernels(library, tmp_path):
    """It links, and asks the library what does not take a GPU."""
    options = {"VTP_CUDA_ARCHS": "9.0", "CMAKE_CUDA_COMPILER": find_nvcc()}
    program = build_consumer(tmp_path, install(library, tmp_path, **options))
    output = subprocess.check_output([program / "cuda_consumer"], text=True)
    assert output.startswith("for 9.0, workspace aligned, device 0: ")
