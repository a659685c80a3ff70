"""Triton's kernels compiled beforehand, for a GPU that is not here: a cache to be carried along.

    python -m benchmarks.gpu_check.triton_cache --arch 90       # writes build/triton-cache.tar.gz

Compiling them takes a quarter of an hour of one core, of which a machine that is lent for minutes
has none to spare. To be found again, kernels must be compiled by the very version of Triton that
runs there, from the same sources; `make gpu-rehearsal` makes an environment with such versions.
What is compiled is what tests/triton_kernels and tests/gpu call, with every setting that is tuned.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.files import replacing
from benchmarks.gpu_check.steps import TRITON_CACHE
from benchmarks.identity import ROOT

GROUP = "__grp__*.json"  # Triton's lists of the files of a kernel, with absolute paths


def unpack(archive: Path, folder: Path) -> int:
    """Makes `folder` the cache, and returns how many kernels it has."""
    folder.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    groups = list(folder.rglob(GROUP))
    for group in groups:
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.with_name(name)) for name in names}
        group.write_text(json.dumps({"child_paths": here}))
    return len(groups)


def pack(folder: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive) as beside, tarfile.open(beside, "w:gz") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.add(path, path.relative_to(folder))


def calls_of(op: str) -> Iterator[Callable[[], object]]:
    """What there is to compile of an op."""
    from variants import VARIANTS

    from conftest import Draw
    from triton_kernels import calls

    yield from calls.of(op)
    draw = Draw(0, "cpu")
    for variant in VARIANTS:
        if variant.op == op:
            for length in (65, 577):
                arguments = variant.draw(draw, length)
                yield lambda v=variant, a=arguments: v.run(a, backend="triton")


def compile_op(op: str, arch: int) -> int:
    """How many kernels of the op were compiled."""
    import torch

    from triton_kernels import ahead_of_time

    seen = {}

    def note(name, kernel, settings, seconds):
        seen[id(kernel)] = kernel

    with ahead_of_time.gpu(arch, note, all_settings=True), torch.no_grad():
        for call in calls_of(op):
            call()
    return len(seen)


def _find_tests() -> None:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]


def main() -> None:
    _find_tests()
    from triton_kernels import ahead_of_time, calls

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--arch", type=int, default=90, choices=ahead_of_time.ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=TRITON_CACHE)
    args = parser.parse_args()
    ops = args.ops or list(calls.OPS)
    if unknown := set(ops) - calls.OPS.keys():
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(calls.OPS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn, initializer=_find_tests) as pool:
            counts = pool.map(compile_op, ops, [args.arch] * len(ops))
            for op, count in zip(ops, counts, strict=True):
                print(f"{op}: {count} kernels for sm_{args.arch}", flush=True)
        pack(Path(folder), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
