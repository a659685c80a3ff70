"""Builds the CUDA kernels for the emulator, with g++ instead of nvcc, as a Python extension module.

    python tests/emulator/build.py [plain | sanitized | races | traffic]

Results lie in build/emulator/<variant>/; ninja rebuilds what changed. VTP_EMULATOR_KERNELS, a list
such as "select_topk,inflection", builds those csrc/*.cu alone; a call of another kernel then ends
the process.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
MODULE = "vtp_kernels_emulated"

# Sums must have the bits the source asks for: nothing may be fused behind its back. Reports name
# lines: -g1 knows them, and compiles half as long as -g.
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g1", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-attributes")
VARIANTS = {
    "plain": ("-O2", "-g0"),
    "sanitized": (
        *("-O1", "-fno-omit-frame-pointer"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ),
    "races": ("-O1", "-DVTP_EMULATOR_RACES"),
    # Accesses stay as the source has them: structs whole, loops rolled up.
    "traffic": (
        *("-O1", "-fno-tree-sra", "-fno-ipa-sra", "--param=max-completely-peel-times=0"),
        "-DVTP_EMULATOR_TRAFFIC",
    ),
}
# Files with kernels report their accesses; accesses.cpp takes the reports, not the compiler's
# library.
KERNEL_FLAGS = {"races": "-fsanitize=thread", "traffic": "-fsanitize=thread"}
# They take most of the time that such a build runs for.
DETECTORS = ("accesses.cpp", "races.cpp", "traffic.cpp")
DETECTOR_FLAGS = "-O2"
KERNELS_OF_TESTS = ("defects.cpp", "primitives.cpp", "requests.cpp", "warpgroup.cpp")
ORDERS = ("forward", "reverse", "random")  # in which threads can run
TORCH_TARGET = "0x020a000000000000"  # as in CMakeLists.txt


def find_tool(name: str) -> str | None:
    # A virtual environment's own tools count even if it was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path)


@functools.cache
def why_not() -> str | None:
    """The reason why nothing can be built here, None if it can."""
    if platform.system() != "Linux":
        return "the emulator is written for Linux"
    for tool in ("g++", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool} here"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11 here"
    return None


def kernel_sources() -> list[Path]:
    """The csrc/*.cu to build."""
    everything = sorted((ROOT / "csrc").glob("*.cu"))
    wanted = os.environ.get("VTP_EMULATOR_KERNELS")
    if not wanted:
        return everything
    names = wanted.split(",")
    return [source for source in everything if source.stem in names]


def folder(variant: str) -> Path:
    chosen = os.environ.get("VTP_EMULATOR_KERNELS", "").replace(",", "+")
    return ROOT / "build" / "emulator" / (f"{variant}-{chosen}" if chosen else variant)


def compile_flags(variant: str) -> list[str]:
    import pybind11
    import torch

    own = (HERE, HERE / "cuda", ROOT / "csrc")
    foreign = (
        pybind11.get_include(),  # torch carries one too
        Path(torch.__path__[0]) / "include",
        sysconfig.get_path("include"),
    )
    return [
        *COMMON,
        *VARIANTS[variant],
        *WARNINGS,
        *(f"-I{path}" for path in own),
        *(f"-isystem{path}" for path in foreign),
        "-DVTP_EMULATOR",
        '-DVTP_CUDA_ARCHS=\\"emulated\\"',
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]


def link_flags(variant: str) -> list[str]:
    import torch

    libraries = Path(torch.__path__[0]) / "lib"
    sanitizers = [flag for flag in VARIANTS[variant] if flag.startswith("-fsanitize")]
    torch_flags = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    return [
        *("-shared", "-pthread", *sanitizers),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", *torch_flags),
    ]


def ninja_file(variant: str) -> str:
    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def joined(flags: list[str]) -> str:
        return " ".join(flag.replace("$", "$$").replace(" ", "\\ ") for flag in flags)

    kernels = [*kernel_sources(), *(HERE / name for name in KERNELS_OF_TESTS)]
    more = dict.fromkeys(kernels, "$kernel_flags")
    more |= {HERE / name: "$detector_flags" for name in DETECTORS}
    objects = {source: f"{source.name}.o" for source in (*kernels, *sorted(HERE.glob("*.cpp")))}
    lines = [
        f"flags = {joined(compile_flags(variant))}",
        f"kernel_flags = {KERNEL_FLAGS.get(variant, '')}",
        f"detector_flags = {DETECTOR_FLAGS}",
        f"link_flags = {joined(link_flags(variant))}",
        "rule compile",
        f"  command = {find_tool('g++')} $flags $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {find_tool('g++')} $in -o $out $link_flags",
        "  description = $out",
        *(
            f"build {target}: compile {escaped(source)}\n  more = {more.get(source, '')}"
            for source, target in objects.items()
        ),
        f"build {MODULE}.so: link {' '.join(objects.values())}",
        f"default {MODULE}.so",
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def locked(directory: Path):
    """One build at a time in a folder, whoever else runs tests."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def build(variant: str = "plain") -> Path:
    """The extension module, up to date. Raises RuntimeError with the compiler's words."""
    directory = folder(variant)
    with locked(directory):
        file, text = directory / "build.ninja", ninja_file(variant)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run = subprocess.run(
            [find_tool("ninja"), "-C", directory, "-j", jobs],
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if run.returncode != 0:
        first = run.stdout[max(run.stdout.find("FAILED"), 0) :]
        raise RuntimeError(f"the emulated kernels do not compile:\n{first[:8000]}")
    return directory / f"{MODULE}.so"


@functools.cache
def load(variant: str = "plain"):
    """The module, built if need be; torch.ops.vtp_kernels_emulated exists from then on."""
    import torch  # noqa: F401  its libraries must be there first

    path = build(variant)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # for builds of some kernels alone
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


@contextlib.contextmanager
def architecture(kernels, number: int):
    """While open, kernels count as compiled for it: 90 has clusters, 80 has not."""
    before = kernels.architecture()
    kernels.set_architecture(number)
    try:
        yield
    finally:
        kernels.set_architecture(before)


def sanitized_environment() -> dict[str, str]:
    """What a Python process needs to load the sanitized module."""

    def library(name: str) -> str:
        command = [find_tool("g++"), f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
