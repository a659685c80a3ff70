"""Compiles the Triton kernels for GPUs that are not there.

The launchers run as on a GPU, on CPU tensors, with a driver that only says which GPU there is.
Where a kernel would be launched it is compiled, with every setting that it is tuned over.

    python tests/triton_kernels/ahead_of_time.py <op>... [--arch 80 ...]

prints a line per compiled kernel. Not in a process with TRITON_INTERPRET=1.
"""

import argparse
import contextlib
import dataclasses
import importlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vtp_kernels import _triton

#: Bytes of shared memory that a block can have.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_MEMORY = {arch: size * 1024 for arch, size in SHARED_MEMORY.items()}
ARCHS = tuple(SHARED_MEMORY)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture; `stack` and `shared` in bytes."""

    kernel: str
    arch: int
    settings: str
    shared: int
    registers: int
    stack: int
    instructions: frozenset[str]  # of the PTX, those that WANTED finds
    seconds: float


#: Products of matrices, with the type they multiply in (tcgen05 calls all 16-bit ones f16), and
#: loads of 16 bytes.
WANTED = re.compile(
    r"(?:(mma\.sync|wgmma)[\w.:]*?|(tcgen05\.mma)[\w.:]*kind:)([.:](?:f16|bf16|tf32)\b)"
    r"|ld\.global[\w.:]*\.(v4\.b32|v2\.b64)"
)


@contextlib.contextmanager
def gpu(arch: int, note: Callable[..., None], all_settings: bool) -> Iterator[None]:
    """Makes Triton compile for that GPU, and calls `note(kernel, compiled, settings, seconds)` in
    the place of every launch; for all settings of tuned kernels, or the first."""
    target = GPUTarget("cuda", arch, 32)
    stub = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: arch,  # compiled kernels are kept by device
        get_current_stream=lambda device: 0,
    )
    run, run_tuned = JITFunction.run, Autotuner.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in (grid(kwargs) if callable(grid) else grid))
        started = time.monotonic()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        settings = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        note(self.fn.__name__, compiled, settings, time.monotonic() - started)

    def run_all(self, *args, **kwargs):
        for config in self.configs if all_settings else self.configs[:1]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    importlib.import_module("vtp_kernels.triton")  # registers them
    known = dict(_triton._reasons)
    _triton._reasons["cpu"] = None
    active, driver._active = driver._active, stub
    JITFunction.run, Autotuner.run = compile_only, run_all
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = run, run_tuned
        driver._active = active
        _triton._reasons.clear()
        _triton._reasons.update(known)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def compile_calls(
    calls: Iterator[Callable[[], object]], arch: int, all_settings: bool = True
) -> list[Compiled]:
    """What the calls would launch."""
    found: dict[int, Compiled] = {}

    def note(name, kernel, settings, seconds):
        if id(kernel) in found:
            return
        kept.append(kernel)  # or another would get its id
        registers, stack = resources(kernel.asm["cubin"])
        wanted = {"".join(groups) for groups in WANTED.findall(kernel.asm["ptx"])}
        settings = " ".join(f"{name}={value}" for name, value in settings.items())
        found[id(kernel)] = Compiled(
            *(name, arch, settings, kernel.metadata.shared, registers, stack),
            *(frozenset(wanted), seconds),
        )

    kept = []
    with gpu(arch, note, all_settings), torch.no_grad():
        for call in calls:
            call()
    return list(found.values())


def main() -> None:
    from triton_kernels import calls

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", default=list(calls.OPS))
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    options = parser.parse_args()
    for op in options.ops:
        for arch in options.arch:
            for x in compile_calls(calls.of(op), arch):
                instructions = " ".join(sorted(x.instructions))
                print(
                    f"{op}: {x.kernel} sm_{x.arch} {x.settings}: {x.registers} registers, "
                    f"stack {x.stack}, shared {x.shared}, {x.seconds:.1f} s {instructions}",
                    flush=True,
                )
                assert x.shared <= SHARED_MEMORY[arch]


if __name__ == "__main__":
    main()
