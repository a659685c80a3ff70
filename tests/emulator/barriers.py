"""What each barrier of the kernels, and each wait for earlier kernels, is for: taken for none, it
makes a race of which two accesses?

    python tests/emulator/barriers.py [<op>...]

prints that, or that nothing happens: the barrier could go, or no case needs it.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np

from emulator import build, cases

SEED = 1
PRIMITIVES = "primitives"
Run = Callable[[], object]


def runs_of(kernels, op: str) -> Iterator[Run]:
    """Everything there is to run for an op, or for the building blocks."""
    if op == PRIMITIVES:
        yield lambda: kernels.primitives.block_operations(np.ones(256, np.int32))
        return
    for case in cases.cases(op, SEED):
        yield lambda case=case: cases.run(kernels, case)


def first_race(runs: Iterator[Run]) -> str | None:
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
        kernels.forget_barriers()  # those that this op does not meet cannot matter to it
        assert first_race(runs_of(kernels, op)) is None
        for barrier in kernels.barriers():
            if barrier.startswith(str(build.HERE)) or purposes.get(barrier):
                continue
            kernels.ignore_barrier(barrier)
            purposes[barrier] = first_race(runs_of(kernels, op))
    for barrier, purpose in sorted(purposes.items()):
        print(f"{barrier}: {purpose or 'no case needs it'}".replace(f"{build.ROOT}/", ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
