"""Runs planted mistakes in a build of their own, each in a forked process, which it may end.

    python tests/emulator/planted.py <variant> <kernel>...

prints what was said of each, as JSON.
"""

import json
import os
import sys
import tempfile

from emulator import build


def report(kernels, name: str) -> str:
    """What the build says of one kernel; nothing if it lets it pass."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            try:
                getattr(kernels.defects, name)()
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        errors.seek(0)
        return errors.read()


if __name__ == "__main__":
    variant, *names = sys.argv[1:]
    kernels = build.load(variant)
    print(json.dumps({name: report(kernels, name) for name in names}))
