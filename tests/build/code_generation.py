"""What nvcc makes of the CUDA kernels: registers, shared memory, spills, instructions.

    python tests/build/code_generation.py [--write]

compares the kernels as built with the table in csrc/code_generation.md, or writes the table anew.
It reads what ptxas said when the library was built; where there is no such build, it compiles
csrc/*.cu by itself, to build/code_generation/.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2].resolve()
CSRC = ROOT / "csrc"
TABLE = CSRC / "code_generation.md"
OWN_BUILD = ROOT / "build" / "code_generation"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Registers a kernel may use beyond the table's where another nvcc built it.
REGISTER_TOLERANCE = 16


# --- what ptxas says --------------------------------------------------------------------------


@dataclasses.dataclass
class Usage:
    """One kernel on one architecture; bytes, but for the registers."""

    kernel: str
    arch: str
    registers: int = 0
    shared: int = 0  # static
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def local(self) -> str | None:
        """What it keeps in local memory, in words, or None: nothing."""
        sizes = {
            "stack frame": self.stack,
            "spill stores": self.spill_stores,
            "spill loads": self.spill_loads,
        }
        return ", ".join(f"{n} bytes {what}" for what, n in sizes.items() if n) or None


ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def dotted(number: str) -> str:
    """sm_120 as 12.0, sm_90a as 9.0a."""
    return re.sub(r"(\d)([a-z]?)$", r".\1\2", number.removeprefix("sm_"))


def parse(log: str) -> list[Usage]:
    """The kernels of a log of `nvcc -Xptxas -v`, by mangled name. A function that a kernel calls
    has properties of its own, which count as the kernel's."""
    usages = []
    for line in log.splitlines():
        if found := ENTRY.search(line):
            usages.append(Usage(found[1], dotted(found[2])))
        elif found := FRAME.search(line):
            usage, (stack, stores, loads) = usages[-1], map(int, found.groups())
            usage.stack = max(usage.stack, stack)
            usage.spill_stores += stores
            usage.spill_loads += loads
        elif found := USED.search(line):
            usages[-1].registers = int(found[1])
            usages[-1].shared = int(found[1]) if (found := SHARED.search(line)) else 0
    return usages


# --- names ------------------------------------------------------------------------------------

TYPES = {"__half": "f16", "__nv_bfloat16": "bf16", "float": "f32", "double": "f64"}


def shortened(name: str) -> str:
    """A demangled kernel's name without its namespace, return type and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("vtp::cuda::", "")
    name = name.replace("vtp::", "")
    name = re.sub(r"\(bool\)([01])", lambda bit: ("false", "true")[int(bit[1])], name)
    name = re.sub(r"\([\w: ]+\)(-?\d)", r"\1", name)  # (int)4
    name = re.sub(r"\b(" + "|".join(TYPES) + r")\b", lambda type_: TYPES[type_[1]], name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter in "<(") - (letter in ">)")
        if letter == "(" and depth == 1:  # of the parameters
            name = name[:i]
            break
    return name.removeprefix("void ")


@functools.cache
def demangler() -> str:
    return shutil.which("c++filt") or stop("c++filt (binutils) is needed to read kernels' names")


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    mangled = sorted(set(mangled))
    text = "\n".join(mangled)
    run = subprocess.run([demangler()], input=text, capture_output=True, text=True, check=True)
    return dict(zip(mangled, map(shortened, run.stdout.split("\n")), strict=False))


def stop(reason: str):
    raise RuntimeError(reason)


# --- builds -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Build:
    """A folder with <op>.cu.o and <op>.cu.ptxas.txt for every csrc/<op>.cu."""

    folder: Path
    nvcc: str  # its version

    def logs(self) -> dict[str, Path]:
        return {source.stem: self.folder / f"{source.name}.ptxas.txt" for source in sources()}

    def objects(self) -> dict[str, Path]:
        return {source.stem: self.folder / f"{source.name}.o" for source in sources()}

    def usages(self) -> list[Usage]:
        """By "<op>: <kernel>", sorted."""
        usages = []
        for op, log in self.logs().items():
            found = parse(log.read_text())
            names = short_names(usage.kernel for usage in found)
            if len(set(names.values())) < len(names):
                stop(f"two kernels of {op}.cu have the same short name: {sorted(names.values())}")
            usages += [
                dataclasses.replace(usage, kernel=f"{op}: {names[usage.kernel]}") for usage in found
            ]
        return sorted(usages, key=lambda usage: (natural(usage.kernel), natural(usage.arch)))


def natural(text: str) -> list:
    """A key that sorts 9.0 before 10.0."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def sources() -> list[Path]:
    return sorted(CSRC.glob("*.cu"))


def library_build() -> Build | None:
    """The newest build that CMake made of the library, if it is whole."""
    builds = []
    for folder in (ROOT / "build").glob("*/CMakeFiles/vtp_cuda.dir/csrc"):
        files = folder.parents[1].glob("*/CMakeCUDACompiler.cmake")
        versions = re.findall(
            r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', "".join(file.read_text() for file in files)
        )
        build = Build(folder, versions[-1] if versions else "unknown")
        files = (*build.logs().values(), *build.objects().values())
        if all(file.exists() for file in files):
            builds.append((max(file.stat().st_mtime for file in files), build))
    return max(builds, key=lambda pair: pair[0])[1] if builds else None


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def is_newer(target: Path, headers: Path) -> bool:
    """Whether nothing was edited since, of the files that a compiler listed in `headers`."""
    if not target.exists() or not headers.exists():
        return False
    listed = headers.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(
        Path(file).exists() and Path(file).stat().st_mtime < target.stat().st_mtime
        for file in listed
    )


def own_build() -> Build:
    nvcc = find_nvcc() or stop("no nvcc here: set CUDA_HOME to the CUDA toolkit")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    build = Build(OWN_BUILD, re.search(r"V([\d.]+)", text)[1])
    build.folder.mkdir(parents=True, exist_ok=True)

    def compile_source(source: Path):
        target, log = build.objects()[source.stem], build.logs()[source.stem]
        headers = target.with_suffix(".d")
        if is_newer(target, headers) and log.exists():
            return
        numbers = [arch.replace(".", "") for arch in ARCHS]
        command = [
            *(nvcc, "-std=c++17", "-O3", "-DNDEBUG", f'-DVTP_CUDA_ARCHS="{",".join(ARCHS)}"'),
            *(f"--generate-code=arch=compute_{n},code=sm_{n}" for n in numbers),
            *("-Xptxas=-v", "-Xfatbin=-compress-all", "-MD", "-MF", str(headers)),
            *("-c", str(source), "-o", str(target)),
        ]
        started = time.time()  # what is edited meanwhile is newer than the result
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            stop(f"nvcc fails on {source.name}:\n{run.stderr[-8000:]}")
        log.write_text(run.stderr)
        os.utime(target, (started, started))

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_source, sources()))
    return build


# --- the table --------------------------------------------------------------------------------

HEADING = """# What nvcc makes of the kernels

Registers of a thread and, after a plus sign, bytes of static shared memory of a block, by compute
capability. No kernel has a stack frame or spills. tests/build/test_code_generation.py compares this
table with what is built; `python tests/build/code_generation.py --write` writes it anew.
"""


def cell(usage: Usage) -> str:
    return f"{usage.registers}+{usage.shared}" if usage.shared else f"{usage.registers}"


def by_kernel(usages: Iterable[Usage]) -> dict[str, dict[str, Usage]]:
    kernels = defaultdict(dict)
    for usage in usages:
        kernels[usage.kernel][usage.arch] = usage
    return dict(kernels)


def render(usages: list[Usage], nvcc: str) -> str:
    archs = sorted({usage.arch for usage in usages}, key=natural)
    lines = [
        HEADING,
        f"nvcc {nvcc}\n",
        "| " + " | ".join(["kernel", *archs]) + " |",
        "|---" * (1 + len(archs)) + "|",
    ]
    for kernel, row in by_kernel(usages).items():
        cells = [cell(row[arch]) if arch in row else "" for arch in archs]
        lines.append("| " + " | ".join([f"`{kernel}`", *cells]) + " |")
    return "\n".join(lines) + "\n"


def read_table(text: str) -> tuple[str, dict[tuple[str, str], Usage]]:
    """nvcc's version, and the usage by kernel and architecture."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (_, *archs), *kernels = rows
    recorded = {}
    for name, *cells in kernels:
        for arch, numbers in zip(archs, cells, strict=False):
            if numbers.strip():
                registers, _, shared = numbers.partition("+")
                usage = Usage(name.strip("`"), arch, int(registers), int(shared or 0))
                recorded[usage.kernel, arch] = usage
    return re.search(r"^nvcc (\S+)$", text, re.MULTILINE)[1], recorded


def complaints(usages: list[Usage], nvcc: str, table: str) -> Iterator[str]:
    """What is wrong with the kernels as built. The table must match, if the same nvcc made it, on
    the architectures that were built; with another nvcc it is a budget."""
    table_nvcc, recorded = read_table(table)
    built_archs = {usage.arch for usage in usages}
    table_archs = {arch for _, arch in recorded}
    for usage in usages:
        if usage.local:
            yield f"{usage.kernel} on {usage.arch} uses local memory: {usage.local}"
        was = recorded.pop((usage.kernel, usage.arch), None)
        if usage.arch not in table_archs:
            continue
        if was is None:
            yield f"{usage.kernel} on {usage.arch} is not in the table"
        elif nvcc == table_nvcc and cell(usage) != cell(was):
            yield f"{usage.kernel} on {usage.arch} is {cell(usage)}, in the table {cell(was)}"
        elif usage.registers > was.registers + REGISTER_TOLERANCE:
            yield f"{usage.kernel} on {usage.arch} is {cell(usage)}, far from {cell(was)}"
    for kernel, arch in recorded:
        if arch in built_archs:
            yield f"{kernel} on {arch} is in the table, but was not built"


# --- machine code -----------------------------------------------------------------------------


@functools.cache
def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None:
        return None
    folder = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    return shutil.which(str(folder / "cuobjdump"))


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
CODE = re.compile(r"^\s*code for sm_(\w+)")


def instructions(listing: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """The instructions, with modifiers, by architecture and mangled name of the function."""
    found, arch, current = {}, "", set()
    for line in listing:
        if match := INSTRUCTION.match(line):
            current.add(match[1])
        elif match := FUNCTION.match(line):
            current = found.setdefault((arch, match[1]), set())
        elif match := CODE.match(line):
            arch = dotted(match[1])
    return found


def machine_code(build: Build) -> dict[tuple[str, str], set[str]]:
    """The instructions in use, by architecture and "<op>: <kernel>"."""

    def of(op: str, file: Path) -> dict[tuple[str, str], set[str]]:
        with subprocess.Popen([disassembler(), "-sass", file], stdout=-1, text=True) as process:
            found = instructions(process.stdout)
        if process.returncode != 0:
            stop(f"cuobjdump fails on {file}")
        names = short_names(function for _, function in found)
        return {(arch, f"{op}: {names[name]}"): used for (arch, name), used in found.items()}

    everything = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for part in pool.map(of, *zip(*build.objects().items(), strict=True)):
            everything.update(part)
    return everything


# Additions of floats in no fixed order, such as RED.E.ADD.F32.FTZ.RN. Where the hardware cannot add
# a type, nvcc loops around a compare and swap, ATOMS.CAST.SPIN or ATOMG.E.CAS.
FLOAT_ATOMIC = re.compile(r"^U?(?:RED|ATOM)[GS]?\.(?:\w+\.)*(?:B?F16|F32|F64|CAS)")
LOCAL_MEMORY = re.compile(r"^(?:LDL|STL)(?:\.|$)")


def moves_16_bytes(used: Iterable[str], instruction: str) -> bool:
    """Whether `instruction`, such as LDG, is among those in use in its form of 16 bytes or more."""
    parts = (name.split(".") for name in used)
    return any(
        name == instruction and {"128", "256"} & set(modifiers) for name, *modifiers in parts
    )


def images(library: Path) -> tuple[set[str], set[str]]:
    """The architectures that a library has machine code for, and those it has PTX for."""

    def listed(option: str) -> set[str]:
        run = subprocess.run([disassembler(), option, library], capture_output=True, text=True)
        return set(map(dotted, re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)\b", run.stdout)))

    return listed("--list-elf"), listed("--list-ptx")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write csrc/code_generation.md")
    parser.add_argument("--compile", action="store_true", help="even if there is a library build")
    options = parser.parse_args(arguments)
    build = (None if options.compile else library_build()) or own_build()
    usages = build.usages()
    if options.write:
        TABLE.write_text(render(usages, build.nvcc))
    wrong = list(complaints(usages, build.nvcc, TABLE.read_text()))
    print("\n".join(wrong) or f"{len(usages)} kernels as in {TABLE.name}, none spills")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
