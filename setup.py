"""Builds the native library by driving CMake; CMakeLists.txt alone says how things compile.

Environment:
    VTP_BUILD: auto (CUDA kernels if there is an nvcc), cuda, here (for the GPUs of this machine, if
        there are any), cpu, or none (a pure-Python package).
    VTP_CUDA_ARCHS, or TORCH_CUDA_ARCH_LIST: GPU architectures, as "8.0;9.0;12.0+PTX".
    CUDA_HOME: the CUDA toolkit.
    MAX_JOBS: how many compilers run at once.
    SOURCE_DATE_EPOCH: the time that a wheel's files carry; the same tree then gives the same bytes.

A wheel's version says what is inside, as in 0.1.0+cu130.sm90.sm120ptx or 0.1.0+cpu, so that several
can lie in one folder. The package itself, and its source distribution, are 0.1.0.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)  # the stable ABI version the library targets, see CMakeLists.txt
OLDEST_NVCC = (12, 1)  # the first with more than 4 KB of kernel parameters
DEFAULT_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # those of them that nvcc has
MODES = ("auto", "cuda", "here", "cpu", "none")


def stop(reason: str):
    raise SystemExit(f"vtp_kernels: {reason}")


def build_mode() -> str:
    mode = os.environ.get("VTP_BUILD") or "auto"
    if mode not in MODES:
        stop(f"VTP_BUILD={mode!r}, expected one of {', '.join(MODES)}")
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


def find_nvcc() -> str | None:
    """nvcc in its toolkit's own folder. On the path it may be a script that calls the real one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = shutil.which(str(Path(home) / "bin" / "nvcc"))
            return nvcc or stop(f"{variable}={home}, but there is no bin/nvcc in it")
    if found := shutil.which("nvcc"):
        plan = subprocess.run([found, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        folder = re.search(r"^#\$ _HERE_=(.+)$", plan.stderr, re.MULTILINE)
        return str(Path(folder[1]) / "nvcc") if folder else found
    return shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_release(nvcc: str) -> tuple[int, int]:
    text = subprocess.check_output([nvcc, "--version"], text=True)
    version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))
    if version < OLDEST_NVCC:
        found, oldest = (".".join(map(str, v)) for v in (version, OLDEST_NVCC))
        stop(f"{nvcc} is {found}, nvcc >= {oldest} is needed; VTP_BUILD=cpu builds without it")
    return version


def gpus_here() -> list[str]:
    """The compute capabilities of the GPUs that torch sees."""
    require_torch()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = (torch.cuda.get_device_capability(index) for index in range(count))
    return sorted({f"{major}.{minor}" for major, minor in found})


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to build, each as 9.0, 9.0a or 12.0+PTX."""
    listed = subprocess.check_output([nvcc, "--list-gpu-code"], text=True)
    known = [re.sub(r"(\d)([a-z]?)$", r".\1\2", name) for name in re.findall(r"sm_(\w+)", listed)]
    for variable in ("VTP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(variable):
            break
    else:
        here = gpus_here() if build_mode() == "here" else []
        if here and set(here) <= set(known):  # what nvcc does not know may run through PTX
            return here
        return [arch for arch in DEFAULT_ARCHS.split(";") if arch.removesuffix("+PTX") in known]
    suffixes = {}  # an architecture named twice is built once, with PTX if either says so
    for wanted in re.split(r"[;,\s]+", os.environ[variable].strip(";, ")):
        arch = wanted.removesuffix("+PTX")
        if arch not in known:
            stop(f"{variable} names {wanted!r}; {nvcc} has {' '.join(known)}, each also with +PTX")
        suffixes[arch] = suffixes.get(arch) or wanted.removeprefix(arch)
    return [arch + suffix for arch, suffix in suffixes.items()]


@dataclass(frozen=True)
class Cuda:
    """What the CUDA kernels are built with, and for."""

    nvcc: str
    release: tuple[int, int]
    archs: list[str]

    @property
    def name(self) -> str:
        """As in cu130.sm90.sm120ptx."""
        archs = ("sm" + arch.lower().replace(".", "").replace("+", "") for arch in self.archs)
        return ".".join(["cu" + "".join(map(str, self.release)), *archs])


@functools.cache
def cuda() -> Cuda | None:
    """None for a build without CUDA kernels."""
    mode = build_mode()
    wanted = mode not in ("cpu", "none") and not (mode == "here" and not gpus_here())
    nvcc = find_nvcc() if wanted else None
    if nvcc is not None:
        return Cuda(nvcc, nvcc_release(nvcc), cuda_archs(nvcc))
    if mode == "cuda":
        stop("VTP_BUILD=cuda, but there is no nvcc; set CUDA_HOME to the CUDA toolkit")
    return None


def cuda_options() -> list[str]:
    """CMake's options for the CUDA kernels."""
    if (found := cuda()) is None:
        return ["-DVTP_CUDA_ARCHS="]
    return [f"-DVTP_CUDA_ARCHS={';'.join(found.archs)}", f"-DCMAKE_CUDA_COMPILER={found.nvcc}"]


def parallel_jobs() -> str:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal() or int(jobs) == 0:
        stop(f"MAX_JOBS={jobs!r}, expected how many compilers may run at once, such as 2")
    return jobs


class WheelVersion(egg_info):
    """Adds to the version of a wheel, and of nothing else, what is inside."""

    def finalize_options(self):
        makes = {"bdist_wheel", "dist_info", "editable_wheel"} & set(self.distribution.commands)
        if makes and build_mode() != "none":
            self.tag_build = "+" + (cuda().name if cuda() else "cpu")
        super().finalize_options()


class CMakeBuild(build_ext):
    """Compiles the one extension module with CMake and ninja, straight to where it belongs."""

    def build_extension(self, ext):
        require_torch()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # An editable install keeps its build folder: the next build compiles what has changed.
        folder = ROOT / "build" / "editable" if self.editable_mode else self.build_temp
        build_dir = Path(folder).resolve()
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        jobs = parallel_jobs()
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DVTP_EXTENSION=ON",
            *cuda_options(),
        ]
        for command in (configure, [cmake, "--build", str(build_dir), "--parallel", jobs]):
            if (status := subprocess.call(command)) != 0:
                stop(f"{Path(command[0]).name} failed with status {status}, see its messages above")


native = build_mode() != "none"
setup(
    ext_modules=[Extension("vtp_kernels._C", [], py_limited_api=True)] if native else [],
    cmdclass={"build_ext": CMakeBuild, "egg_info": WheelVersion},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
