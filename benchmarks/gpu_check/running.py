"""Processes that are ended with all that they have started: at their time, or if this one ends."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.identity import ROOT

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
LAST = 4000  # characters of a log that are shown


class Process:
    """A command in a process group of its own. Its output goes to a file, which outlives it."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.command, self.log = command, log
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=_die_with_the_parent,
            )

    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def kill(self) -> int:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


def run(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    until: float,
    tick: Callable[[], None],
) -> int | None:
    """Its exit status; None if it was stopped `until` (of time.monotonic). Calls `tick` as it
    waits."""
    process = Process(command, log, environment)
    try:
        while (status := process.status()) is None:
            if time.monotonic() > until:
                return None
            tick()
            time.sleep(0.1)
        return status
    finally:
        process.kill()  # and what it may have left running


def described(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"
