"""What nvcc makes of the CUDA kernels: registers, shared memory, spills, instructions, waits.

    python tests/build/code_generation.py [--write]

compares the kernels as built with the tables in csrc/code_generation.md, or writes the tables anew.
It reads what ptxas said when the library was built, and the objects; where there is no such build,
it compiles csrc/*.cu by itself, to build/code_generation/.
"""

import argparse
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from round_trips import RoundTrips, round_trips
from sass import disassembled, disassembler, dotted

ROOT = Path(__file__).parents[2].resolve()
CSRC = ROOT / "csrc"
TABLE = CSRC / "code_generation.md"
OWN_BUILD = ROOT / "build" / "code_generation"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Its products exist in code for 9.0a alone: it is compiled for that where the others are for 9.0.
WARPGROUP, WARPGROUP_ARCH = "attention_scores_warpgroup", "9.0a"
WAITS_ARCH = "9.0"  # of the table of waits, with the other one
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

    def folder_of(self, op: str) -> Path:
        """CMake has a target, and a folder, for what is compiled for 9.0a."""
        name = self.folder.parent.name.replace("vtp_cuda.dir", "vtp_cuda_warpgroup.dir")
        beside = self.folder.parents[1] / name / self.folder.name
        return beside if op == WARPGROUP else self.folder

    def files(self, suffix: str) -> dict[str, Path]:
        names = {source.stem: source.name for source in sources()}
        return {op: self.folder_of(op) / f"{name}{suffix}" for op, name in names.items()}

    def logs(self) -> dict[str, Path]:
        return self.files(".ptxas.txt")

    def objects(self) -> dict[str, Path]:
        return self.files(".o")

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


def archs_of(op: str, archs: Iterable[str] = ARCHS) -> set[str]:
    """Those that an op's kernels are compiled for, where a library is for `archs`."""
    archs = set(archs)
    if op != WARPGROUP:
        return archs
    return {WARPGROUP_ARCH} if archs & {WAITS_ARCH, WARPGROUP_ARCH} else set()


def waits_arch(op: str) -> str:
    return WARPGROUP_ARCH if op == WARPGROUP else WAITS_ARCH


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


def compile_source(source: Path, target: Path, *options: str) -> None:
    """With the library's options and these, unless `target` is newer; what ptxas says is kept in
    <target>.ptxas.txt."""
    log, headers = target.with_suffix(".ptxas.txt"), target.with_suffix(".d")
    if is_newer(target, headers) and log.exists():
        return
    nvcc = find_nvcc() or stop("no nvcc here: set CUDA_HOME to the CUDA toolkit")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(nvcc, "-std=c++17", "-O3", "-DNDEBUG", f'-DVTP_CUDA_ARCHS="{",".join(ARCHS)}"'),
        *("-Xptxas=-v", "-MD", "-MF", str(headers), *options, str(source), "-o", str(target)),
    ]
    started = time.time()  # what is edited meanwhile is newer than the result
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        stop(f"nvcc fails on {source.name}:\n{run.stderr[-8000:]}")
    log.write_text(run.stderr)
    os.utime(target, (started, started))


def generate_code(op: str) -> list[str]:
    """nvcc's options for the architectures of an op."""
    numbers = [arch.replace(".", "") for arch in sorted(archs_of(op), key=natural)]
    defined = ["-DVTP_WITH_WARPGROUP"] if op == WARPGROUP else []
    return [*defined, *(f"--generate-code=arch=compute_{n},code=sm_{n}" for n in numbers)]


def own_build() -> Build:
    nvcc = find_nvcc() or stop("no nvcc here: set CUDA_HOME to the CUDA toolkit")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    build = Build(OWN_BUILD, re.search(r"V([\d.]+)", text)[1])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        running = [
            pool.submit(
                compile_source,
                *(source, build.objects()[source.stem]),
                *("-c", "-Xfatbin=-compress-all", *generate_code(source.stem)),
            )
            for source in sources()
        ]
        for compilation in running:
            compilation.result()
    return build


# --- the table of registers ------------------------------------------------------------------

HEADING = """# What nvcc makes of the kernels

Registers of a thread and, after a plus sign, bytes of static shared memory of a block, by compute
capability. No kernel has a stack frame or spills. tests/build/test_code_generation.py compares the
tables with what is built; `python tests/build/code_generation.py --write` writes them anew.
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


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its heading first."""
    return [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def read_table(text: str) -> tuple[str, dict[tuple[str, str], Usage]]:
    """nvcc's version, and the usage by kernel and architecture."""
    (_, *archs), *kernels = rows_of(text.split(WAITS_TITLE)[0])
    recorded = {}
    for name, *cells in kernels:
        for arch, numbers in zip(archs, cells, strict=False):
            if numbers:
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


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code: how often each instruction is in it, with modifiers, and on the
    architecture of waits what it waits for."""

    used: Counter[str]
    waits: RoundTrips | None


def machine_code(build: Build, waits_alone: bool = False) -> dict[tuple[str, str], Code]:
    """By architecture (all, or that of waits) and "<op>: <kernel>", sorted."""

    def of(op: str, file: Path) -> dict[tuple[str, str], Code]:
        found = {}
        for function in disassembled(file, waits_arch(op) if waits_alone else None):
            has_waits = function.arch == waits_arch(op)
            waits = round_trips(function.instructions) if has_waits else None
            used = Counter(instruction.opcode for instruction in function.instructions)
            found[function.arch, function.name] = Code(used, waits)
        names = short_names(name for _, name in found)
        return {(arch, f"{op}: {names[name]}"): code for (arch, name), code in found.items()}

    everything = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for part in pool.map(of, *zip(*build.objects().items(), strict=True)):
            everything.update(part)
    return dict(sorted(everything.items(), key=lambda item: [natural(x) for x in item[0]]))


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


def images_of(archs: Iterable[str]) -> tuple[set[str], set[str]]:
    """The same of a library for `archs`, such as 9.0 and 12.0+PTX."""
    machine = {arch.removesuffix("+PTX") for arch in archs}
    ptx = {arch.removesuffix("+PTX") for arch in archs if arch.endswith("+PTX")}
    return machine | archs_of(WARPGROUP, machine), ptx


# --- the table of waits -----------------------------------------------------------------------

WAITS_TITLE = f"## Waits on {WAITS_ARCH}"
WAITS_TEXT = """
Round trips to memory that a warp stands still for, from the start to the first barrier and to the
end; and to the end if loads of 1 or 2 bytes took no time, as of masks and of rows not aligned.
Of paths that part, the one with the most counts; each loop is gone through once. The places in the
code that wait for one, and how many loads are on their way there, on average. The loops, in order
of address: instructions of an iteration, without those of loops inside, and in brackets the round
trips it waits for. What counts is told in tests/build/round_trips.py; `python tests/build/waits.py
KERNEL` shows where they are. Products of a warpgroup are in code for 9.0a alone.
"""
COLUMNS = {  # title -> what its cells are
    "to the first barrier": "round trips to the first barrier",
    "to the end": "round trips",
    "of wide loads": "round trips of wide loads",
    "waits": "places that wait for a round trip",
    "loads a wait": "loads on their way at a wait",
    "loops": "as its loops",
}


def waits_cells(waits: RoundTrips) -> list[str]:
    numbers = (waits.first, waits.trips, waits.wide, len(waits.waits))
    return [*map(str, numbers), f"{waits.loads_per_wait:.1f}", ", ".join(map(str, waits.loops))]


def render_waits(codes: dict[tuple[str, str], Code]) -> str:
    rows = [
        [f"`{kernel}`", *waits_cells(code.waits)]
        for (_, kernel), code in codes.items()
        if code.waits
    ]
    if not rows:
        stop(f"nothing was built for {WAITS_ARCH}")
    lines = [f"| {' | '.join(row)} |" for row in (["kernel", *COLUMNS], *rows)]
    lines.insert(1, "|---" * (1 + len(COLUMNS)) + "|")
    return "\n".join([WAITS_TITLE, WAITS_TEXT, *lines]) + "\n"


def read_waits(text: str) -> dict[str, list[str]]:
    """The cells by kernel."""
    _, title, rest = text.partition(WAITS_TITLE)
    if not title:
        return {}
    (_, *columns), *kernels = rows_of(rest)
    if columns != list(COLUMNS):
        stop(f"the columns of the table of waits are {columns}")
    return {name.strip("`"): cells for name, *cells in kernels}


def grew(column: str, now: str, was: str) -> bool:
    """Whether a kernel became worse by more than another nvcc may make it. From 12.9 to 13.4 round
    trips stay as they are, and loops within a tenth."""
    if column == "loops":
        return _most_slots(now) > 1.2 * _most_slots(was)
    if column == "loads a wait":
        return float(now) < 0.8 * float(was)
    return int(now) > int(was) + 1


def _most_slots(loops: str) -> int:
    return max(map(int, re.findall(r"(\d+)(?: \(|,|$)", loops)), default=0)


def waits_complaints(codes: dict[tuple[str, str], Code], nvcc: str, table: str) -> Iterator[str]:
    """As `complaints`, of what the kernels wait for."""
    recorded = read_waits(table)
    table_nvcc, _ = read_table(table)
    for (arch, kernel), code in codes.items():
        if code.waits is None:
            continue
        was = recorded.pop(kernel, None)
        if was is None:
            yield f"{kernel} on {arch} is not in the table of waits"
            continue
        for (title, what), now, before in zip(
            COLUMNS.items(), waits_cells(code.waits), was, strict=True
        ):
            if now != before if nvcc == table_nvcc else grew(title, now, before):
                yield f"{kernel} on {arch} has {now or '-'} {what}, in the table {before or '-'}"
    if any(arch == WAITS_ARCH for arch, _ in codes):
        yield from (f"{kernel} is in the table of waits, but was not built" for kernel in recorded)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write csrc/code_generation.md")
    parser.add_argument("--compile", action="store_true", help="even if there is a library build")
    options = parser.parse_args(arguments)
    build = (None if options.compile else library_build()) or own_build()
    usages = build.usages()
    disassembler() or stop("no cuobjdump here: neither the CUDA toolkit's nor triton's")
    codes = machine_code(build, waits_alone=True)
    if options.write:
        TABLE.write_text(render(usages, build.nvcc) + "\n" + render_waits(codes))
    table = TABLE.read_text()
    wrong = [
        *complaints(usages, build.nvcc, table),
        *waits_complaints(codes, build.nvcc, table),
    ]
    print("\n".join(wrong) or f"{len(usages)} kernels as in {TABLE.name}, none spills")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
