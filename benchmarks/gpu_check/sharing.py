"""The tests of a step, by several processes that take them one by one: see worker.py.

A process that crashes, hangs, or loses its device costs the test that it was in: another process
goes on with what is left.
"""

import dataclasses
import os
import sys
import time

from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.running import Process, described
from benchmarks.gpu_check.worker import Settings, claim_of
from benchmarks.lost_device import DEVICE_LOST

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
PLUGIN = ("-p", "benchmarks.gpu_check.worker")
MOST_RESTARTS = 20  # in a step


@dataclasses.dataclass
class Worker:
    name: str
    process: Process
    test: str | None = None  # in which it is
    since: float = 0.0
    ran: int = 0


class Sharing:
    """`selection`: pytest's arguments. `done`: tests that are not run again. `longest`: seconds
    that one test may take. `grace`: seconds before the end at which no test begins any more, so
    that processes can end well."""

    def __init__(
        self,
        check: Check,
        step: str,
        selection: list[str],
        workers: int,
        until: float,
        *,
        done: list[str],
        prefix: list[str] | None = None,
        environment: dict[str, str] | None = None,
        most: int | None = None,
        longest: float = 60.0,
        grace: float = 2.0,
    ) -> None:
        self.check, self.step, self.until = check, step, until
        self.command = [*(prefix or []), *PYTEST, *PLUGIN, *selection]
        self.wanted, self.longest, self.grace, self.most = workers, longest, grace, most
        self.environment = {**check.environment(), **(environment or {})}
        self.folder = check.folder(step)
        self.claims = self.folder / "claims"
        self.claims.mkdir(exist_ok=True)
        self.done = self.claims / "done.txt"
        self.done.write_text("\n".join(done))
        self.started, self.restarts = 0, 0
        self.followed = 0  # lines of the journal
        self.workers: list[Worker] = []
        self.killed: set[str] = set()  # names of processes

    def run(self) -> None:
        try:
            for _ in range(self.wanted):
                self._start()
            while self.workers:
                self._look()
                time.sleep(0.05)
        finally:
            for worker in self.workers:
                worker.process.kill()

    def _start(self) -> None:
        self.started += 1
        name = f"{self.check.calls}-{self.started}"
        left = self.until - self.grace - time.monotonic()
        settings = Settings(
            journal=str(self.check.journal.path),
            step=self.step,
            worker=name,
            claims=str(self.claims),
            done=str(self.done),
            until=time.time() + left,
            parent=os.getpid(),
            most=self.most,
        )
        environment = self.environment | settings.environment()
        process = Process(self.command, self.folder / f"{name}.log", environment)
        self.workers.append(Worker(name, process))

    def _look(self) -> None:
        now = time.monotonic()
        ended = {worker.name: worker.process.status() for worker in self.workers}
        self.check.tick()
        self._follow(now)
        for worker in list(self.workers):
            status = ended[worker.name]
            if status is not None:
                self._end(worker, "crashed", described(status), status)
            elif now > self.until:
                self._kill(worker, "stopped", "the step's time was over")
            elif worker.test is not None and now - worker.since > self.longest:
                self._kill(worker, "hung", f"stopped after {self.longest:.0f} s")

    def _follow(self, now: float) -> None:
        """Which test each process is in."""
        by_name = {worker.name: worker for worker in self.workers}
        entries = self.check.entries.get(self.step, [])
        for entry in entries[self.followed :]:
            worker = by_name.get(entry.get("worker"))
            if worker is None or "test" not in entry:
                continue
            if entry["outcome"] == "started":
                worker.test, worker.since = entry["test"], now
                worker.ran += 1
            elif entry["test"] == worker.test:
                worker.test = None
        self.followed = len(entries)

    def _kill(self, worker: Worker, outcome: str, why: str) -> None:
        self.killed.add(worker.name)
        status = worker.process.kill()
        self.check.read()
        self._follow(time.monotonic())
        self._end(worker, outcome, why, status)

    def _end(self, worker: Worker, outcome: str, why: str, status: int) -> None:
        self.workers.remove(worker)
        worker.process.kill()  # and what it has left running
        output = worker.process.output()
        if worker.test is not None:
            message = f"{why}\n{output[-1500:]}"
            self.check.journal.add(
                step=self.step,
                worker=worker.name,
                test=worker.test,
                outcome=outcome,
                seconds=round(time.monotonic() - worker.since, 3),
                message=message,
            )
            self.check.read()
        self._release(worker)
        more = worker.test is not None or status == DEVICE_LOST
        time_left = self.until - self.grace - time.monotonic()
        if more and worker.ran and self.restarts < MOST_RESTARTS and time_left > 0:
            self.restarts += 1
            self._start()

    def _release(self, worker: Worker) -> None:
        """Lets others have the tests that it has taken and not begun."""
        begun = {
            claim_of(entry["test"])
            for entry in self.check.entries.get(self.step, [])
            if entry.get("worker") == worker.name and "test" in entry
        }
        for path in self.claims.iterdir():
            if path != self.done and path.name not in begun and path.read_text() == worker.name:
                path.unlink()
