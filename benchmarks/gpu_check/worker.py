"""A pytest plugin: one of several processes that share the tests of a step between them.

Each process collects all tests and takes the next that no other has taken, so no other plugin is
needed to run them in parallel. A test is written down as it begins and as it ends: whoever is
killed in a test is known by it, and whoever comes after goes on with the rest.

`gpu_check` sets VTP_CHECK_WORKER, a JSON object with the attributes of `Settings`.
"""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check.journal import LONGEST, Journal
from benchmarks.lost_device import DEVICE_LOST, why_lost

VARIABLE = "VTP_CHECK_WORKER"


@dataclasses.dataclass(frozen=True)
class Settings:
    """`claims`: a folder, in which a test that is taken has a file. `done`: a file of tests that
    are not run again. No test begins after `until` (seconds since 1970), or once the process
    `parent` has ended. `most`: no more tests than that, of all files alike."""

    journal: str
    step: str
    worker: str
    claims: str
    done: str
    until: float
    parent: int
    most: int | None = None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


def claim_of(test: str) -> str:
    return hashlib.sha256(test.encode()).hexdigest()[:24]


def pytest_configure(config):
    if settings := os.environ.get(VARIABLE):
        config.pluginmanager.register(Worker(Settings(**json.loads(settings))))


class Worker:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.journal = Journal(Path(settings.journal))
        self.done = set(Path(settings.done).read_text().splitlines())
        self.reports: list = []

    def note(self, **entry) -> None:
        self.journal.add(step=self.settings.step, worker=self.settings.worker, **entry)

    def pytest_collectreport(self, report):
        if report.failed:
            said = f"not collected: {report.longreprtext[-LONGEST:]}"
            self.note(test=report.nodeid, outcome="failed", seconds=0, message=said)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        most = self.settings.most
        if most is not None and len(items) > most:
            items[:] = [items[i * len(items) // most] for i in range(most)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.config.option.collectonly:
            return None
        self.note(collected=len(session.items))
        mine = self.taken(session.items)
        item = next(mine, None)
        while item is not None:
            following = next(mine, None)  # whose fixtures may stay as they are
            self.run(item, following)
            item = following
        return True

    def taken(self, items):
        """Those that this process runs, each taken as it is asked for."""
        for item in items:
            if time.time() > self.settings.until or not _lives(self.settings.parent):
                return
            if item.nodeid not in self.done and self.take(item.nodeid):
                yield item

    def take(self, test: str) -> bool:
        path = os.path.join(self.settings.claims, claim_of(test))
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        os.write(file, self.settings.worker.encode())
        os.close(file)
        return True

    def run(self, item, following) -> None:
        self.note(test=item.nodeid, outcome="started")
        self.reports = []
        began = time.monotonic()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        outcome, message = _outcome(self.reports)
        seconds = round(time.monotonic() - began, 3)
        self.note(test=item.nodeid, outcome=outcome, seconds=seconds, message=message)
        if outcome == "failed" and (why := why_lost()):
            print(f"the device is lost after {item.nodeid}: {why}", flush=True)
            pytest.exit("the device is lost", returncode=DEVICE_LOST)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)


def _outcome(reports: list) -> tuple[str, str]:
    """(failed, skipped or passed; what was said of it)."""
    for report in reports:
        if report.failed:
            return "failed", report.longreprtext[-LONGEST:]
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "as expected"
            return "skipped", str(reason)[:LONGEST]
    return ("passed", "") if reports else ("failed", "pytest reported nothing")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
