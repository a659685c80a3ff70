"""What each barrier of the kernels, and each wait for earlier kernels, is for: taken for none, it
makes a race of which two accesses?

    python tests/emulator/barriers.py [<op>...]

prints that, or that nothing happens: the barrier could go, or no case needs it.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from emulator import build, cases

SEED = 1
PRIMITIVES = "primitives"
Run = Callable[[], object]


def runs_of(kernels, op: str) -> list[Run]:
    """Everything there is to run for an op, or for the building blocks, as often as need be: ops
    that work in place change what they find, but not where they look."""
    if op == PRIMITIVES:
        return [lambda: kernels.primitives.block_operations(np.ones(256, np.int32))]
    return [lambda case=case: cases.run(kernels, case) for case in cases.cases(op, SEED)]


def runs_by_barrier(kernels, runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Each barrier and the runs that come to it, the shortest first: no other needs it. None of
    them may race."""
    found = defaultdict(list)
    for run in runs:
        kernels.forget_barriers()
        before = kernels.switches()
        run()
        length = kernels.switches() - before
        for barrier in kernels.barriers():
            found[barrier].append((length, run))
    return {
        barrier: [run for _, run in sorted(pairs, key=lambda pair: pair[0])]
        for barrier, pairs in found.items()
    }


def first_race(runs: Iterable[Run]) -> str | None:
    for run in runs:
        try:
            run()
        except RuntimeError as error:
            return str(error)
    return None


def main(*ops: str) -> None:
    kernels = build.load("races")
    kernels.set_shared_limit(cases.SHARED_BYTES)
    purposes: dict[str, str | None] = {}
    for op in ops or (PRIMITIVES, *cases.OPS):
        for barrier, runs in runs_by_barrier(kernels, runs_of(kernels, op)).items():
            if barrier.startswith(str(build.HERE)) or purposes.get(barrier):
                continue
            kernels.ignore_barrier(barrier)
            purposes[barrier] = first_race(runs)
        kernels.ignore_barrier("")
    for barrier, purpose in sorted(purposes.items()):
        print(f"{barrier}: {purpose or 'no case needs it'}".replace(f"{build.ROOT}/", ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
