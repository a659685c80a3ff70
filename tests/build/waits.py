"""Lists what a kernel waits for, by address and source line.

    python tests/build/waits.py KERNEL [--arch 9.0]

compiles the source of the kernel as it is now, for one architecture, and reads its machine code.
KERNEL is a part of a name in csrc/code_generation.md, such as finish_and_select, "key_pass<bf16, 2"
or "select_topk:". What counts as a wait is told in round_trips.py.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from code_generation import (
    OWN_BUILD,
    WAITS_ARCH,
    WARPGROUP,
    compile_source,
    short_names,
    sources,
    stop,
    waits_arch,
)
from round_trips import RoundTrips, round_trips
from sass import Function, disassembled, disassembler


def compiled(source: Path, arch: str) -> Path:
    """The cubin of a source file, with line numbers, which change nothing else."""
    number = arch.replace(".", "")
    target = OWN_BUILD / f"{source.stem}.sm_{number}.cubin"
    defined = ["-DVTP_WITH_WARPGROUP"] if source.stem == WARPGROUP else []
    compile_source(source, target, "-cubin", "-lineinfo", f"-arch=sm_{number}", *defined)
    return target


FILE = re.compile(r'"([^"]+)", line (\d+)')
SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
ADDRESS = re.compile(r"\s+/\*([0-9a-f]{4,})\*/")


def source_lines(listing: Iterable[str]) -> dict[tuple[str, int], str]:
    """Mangled name and address -> "a.cuh:1 < b.cu:2", from what `nvdisasm -gi` prints: the line and
    the one it was inlined at, of lines in csrc."""
    found, function, lines, complete = {}, "", [], True
    for text in listing:
        if match := SECTION.match(text):
            function, lines = match[1], []
        elif text.lstrip().startswith("//## File "):
            lines, complete = [] if complete else lines, False
            lines += [place for place in FILE.findall(text)[:1] if "/csrc/" in place[0]]
        elif match := ADDRESS.match(text):
            complete = True
            shown = " < ".join(f"{Path(file).name}:{line}" for file, line in lines[:2])
            found[function, int(match[1], 16)] = shown
    return found


def described(kernel: str, function: Function, trips: RoundTrips, lines: dict) -> str:
    """Every wait, barrier and loop, in order of address."""

    def place(address: int) -> str:
        return f"{address:04x} {lines.get((function.name, address), '')}".strip()

    told = [(x.address, f"{place(x.address)}: {x}") for x in trips.barriers]
    for loop in trips.loops:
        text = f"loop; instructions: {loop.slots}, round trips of an iteration: {loop.trips:g}"
        told.append((loop.address, f"{place(loop.address)}: {text}"))
    for wait in trips.waits:
        loads = [f"\n      {place(load.address)}: {load}" for load in wait.loads]
        address = wait.instruction.address
        text = f"{place(address)}: {wait.instruction}\n    waits for"
        told.append((address, text + "".join(loads)))
    heading = (
        f"{kernel} on {function.arch}\n  round trips to the first barrier: {trips.first}, to the "
        f"end: {trips.trips}, of wide loads: {trips.wide}; waits: {len(trips.waits)}, "
        f"loads a wait: {trips.loads_per_wait:.1f}"
    )
    return "\n".join([heading, *(f"  {text}" for _, text in sorted(told))])


def disassembled_with_lines(cubin: Path) -> tuple[list[Function], dict[tuple[str, int], str]]:
    nvdisasm = disassembler("nvdisasm") or stop("no nvdisasm here")
    command = [nvdisasm, "-gi", "-c", cubin]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(disassembled(cubin)), source_lines(run.stdout.splitlines())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kernel")
    parser.add_argument("--arch", help=f"default: {WAITS_ARCH}, or 9.0a for what is for it alone")
    options = parser.parse_args(arguments)
    disassembler() or stop("no cuobjdump here: neither the CUDA toolkit's nor triton's")
    op, _, name = options.kernel.rpartition(":")
    word = re.match(r"\w*", name.strip())[0]
    found = 0
    for source in sources():
        if op not in ("", source.stem) or word not in source.read_text():
            continue
        arch = options.arch or waits_arch(source.stem)
        functions, lines = disassembled_with_lines(compiled(source, arch))
        names = short_names(function.name for function in functions)
        for function in functions:
            kernel = f"{source.stem}: {names[function.name]}"
            if options.kernel in kernel:
                found += 1
                print(described(kernel, function, round_trips(function.instructions), lines))
    if not found:
        print(f"no kernel {options.kernel!r} in {', '.join(x.name for x in sources())}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
