"""Builds the native library by driving CMake; CMakeLists.txt alone says how things compile.

Environment: VTP_BUILD = auto | cuda | cpu | none (none: a pure-Python package), MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)  # the stable ABI version the library targets, see CMakeLists.txt
MODES = ("auto", "cuda", "cpu", "none")


def stop(reason: str):
    raise SystemExit(f"vtp_kernels: {reason}")


def build_mode() -> str:
    mode = os.environ.get("VTP_BUILD") or "auto"
    if mode not in MODES:
        stop(f"VTP_BUILD={mode!r}, expected one of {', '.join(MODES)}")
    if mode == "cuda" and not any((ROOT / "csrc").glob("*.cu")):
        stop("VTP_BUILD=cuda, but this source tree holds no CUDA kernels (no csrc/*.cu)")
    return mode


def require_torch():
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ImportError:
        stop(
            f"the native library is built against torch >= {oldest}, which is not installed here: "
            "install it and use --no-build-isolation, or set VTP_BUILD=none for pure Python"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        stop(f"torch {torch.__version__} is too old, torch >= {oldest} is needed")


def find_tool(name: str) -> str:
    # A virtual environment's own tools count even if it was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or stop(f"{name} not found (pip install {name})")


class CMakeBuild(build_ext):
    """Compiles the one extension module with CMake and ninja, straight to where it belongs."""

    def build_extension(self, ext):
        require_torch()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build_dir = Path(self.build_temp).resolve()
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVTP_VERSION={self.distribution.get_version()}",
        ]
        for command in (configure, [cmake, "--build", str(build_dir), "--parallel", jobs]):
            if (status := subprocess.call(command)) != 0:
                stop(f"{Path(command[0]).name} failed with status {status}, see its messages above")


native = build_mode() != "none"
setup(
    ext_modules=[Extension("vtp_kernels._C", [], py_limited_api=True)] if native else [],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
