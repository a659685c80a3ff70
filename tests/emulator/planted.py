"""Runs planted memory errors in the sanitized build, each in a forked process, which it ends.

    python tests/emulator/planted.py <kernel>...

prints what each was told, as JSON.
"""

import json
import os
import sys
import tempfile

from emulator import build


def report(kernels, name: str) -> str:
    """What the sanitizers say of one kernel; nothing if they let it pass."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            getattr(kernels.defects, name)()
            os._exit(0)
        os.waitpid(child, 0)
        errors.seek(0)
        return errors.read()


if __name__ == "__main__":
    kernels = build.load("sanitized")
    print(json.dumps({name: report(kernels, name) for name in sys.argv[1:]}))
