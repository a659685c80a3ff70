"""One check: where its files are, how far it has come, and what is kept of it at any time.

In the folder that comes back there are few files, whole at any time: `check.json`, the result;
`journal.jsonl`, a line a test; `logs.tar.gz`, what the processes printed and a JUnit file a step;
and what the benchmarks wrote. Logs lie elsewhere until they are packed: there are many.
"""

import dataclasses
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.files import replacing, write_json
from benchmarks.gpu_check.journal import Journal, write_junit
from benchmarks.identity import ROOT, identity

FILES = (
    *("check.json", "journal.jsonl", "logs.tar.gz"),
    *("bench*.json", "end_to_end-*.json", "compiled.json"),
)
ARCHIVE_SECONDS = 30.0  # between two archives as a step runs


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the plan runs. A rehearsal is the same plan on a CPU, with a few of the tests."""

    rehearsal: bool
    cores: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def workers(self, wanted: int) -> int:
        return max(1, min(wanted, self.cores))


def gpus() -> str | None:
    """Which there are, by name; None where the driver's tool is not there to say."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


class Check:
    """`plan`: the names of the steps, in order."""

    def __init__(
        self, out: Path, machine: Machine, plan: list[str], budget: float, resume: bool = False
    ) -> None:
        self.out, self.machine, self.plan, self.budget = out, machine, plan, budget
        self.temporary = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.logs = self.temporary / "logs"
        self.logs.mkdir()
        self.journal = Journal(out / "journal.jsonl")
        self.entries: dict[str, list[dict]] = {}
        self.results: dict[str, dict] = {}
        self.found: dict = {}  # by the step that looks at the machine
        self.seed = int.from_bytes(os.urandom(4), "little")  # of the tests' inputs
        self.calls, self.whose = 1, {**identity(), "gpus": gpus()}
        self._changed, self._wrote, self._packed = set(), 0.0, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if resume and self.journal.path.exists():
            self._go_on()
        else:
            self._start_anew()
        self.journal.add(call=self.calls, identity=self.whose, rehearsal=machine.rehearsal)

    def _start_anew(self) -> None:
        for pattern in FILES:
            for path in self.out.glob(pattern):
                path.unlink()

    def _go_on(self) -> None:
        """With what was found by the same sources and library; a library that the check built
        itself may be built again, and differ."""
        self.journal.mend()
        entries = self.journal.new()
        calls = [entry for entry in entries if "call" in entry]
        built = any(entry.get("result", {}).get("built") for entry in entries)
        now, before = self.whose, calls[-1]["identity"] if calls else {}
        same = all(
            now[name] == before.get(name) for name in now if not (built and name == "library")
        )
        if not same or calls[-1]["rehearsal"] != self.machine.rehearsal:
            print("gpu-check: what is there is of other sources or another machine: starting anew")
            self._start_anew()
            self.journal = Journal(self.journal.path)
            return
        self.calls = calls[-1]["call"] + 1
        for entry in entries:
            self._take(entry)
        if (self.out / "logs.tar.gz").exists():
            with tarfile.open(self.out / "logs.tar.gz") as archive:
                archive.extractall(self.logs, filter="data")

    # --- what has happened ----------------------------------------------------------------------

    def _take(self, entry: dict) -> None:
        step = entry.get("step")
        if step is None:
            return
        if "result" in entry:
            self.results[step] = entry["result"]
        else:
            self.entries.setdefault(step, []).append(entry)
        self._changed.add(step)

    def read(self) -> list[dict]:
        """What has been written down since the last call."""
        entries = self.journal.new()
        for entry in entries:
            self._take(entry)
        return entries

    def tick(self) -> None:
        """Called a few times a second while anything runs."""
        self.read()
        now = time.monotonic()
        if self._changed and now - self._wrote > 1:
            self.write()
        if now - self._packed > ARCHIVE_SECONDS:
            self.pack()

    def finish(self, step: str, result: dict) -> None:
        self.journal.add(step=step, result=result | {"call": self.calls})
        self.read()
        self.write()
        self.pack()

    def folder(self, step: str) -> Path:
        path = self.logs / step
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- what is kept ---------------------------------------------------------------------------

    def is_ok(self, step: str) -> bool:
        return self.results.get(step, {}).get("state") == "ok"

    def ok(self) -> bool:
        return all(map(self.is_ok, self.plan))

    def write(self) -> None:
        for step in self._changed & self.entries.keys():
            write_junit(self.folder(step) / "junit.xml", step, self.entries[step])
        self._changed.clear()
        self._wrote = time.monotonic()
        not_run = {"state": "not run"}
        content = {
            "ok": self.ok(),
            "rehearsal": self.machine.rehearsal,
            "steps": {name: self.results.get(name, not_run) for name in self.plan},
            "budget": self.budget,
            "calls": self.calls,
            "seed": self.seed,
            **self.found,
        }
        write_json(self.out / "check.json", content)

    def pack(self) -> None:
        """All logs so far, in one file."""
        with (
            replacing(self.out / "logs.tar.gz") as beside,
            tarfile.open(beside, "w:gz", compresslevel=4) as archive,
        ):
            for path in sorted(self.logs.rglob("*")):
                if path.is_file() and "claims" not in path.parts:
                    archive.add(path, path.relative_to(self.logs))
        self._packed = time.monotonic()

    def close(self) -> None:
        self.write()
        self.pack()
        shutil.rmtree(self.temporary, ignore_errors=True)

    # --- what processes are told ----------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        path = os.environ.get("PATH", os.defpath)
        if self.machine.rehearsal:  # the real tools want a GPU
            path = f"{ROOT / 'tests/gpu/stand_ins'}{os.pathsep}{path}"
        return {
            "PATH": path,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the same plan, whatever is installed
            "VTP_GPU_REHEARSAL": "1" if self.machine.rehearsal else "",
            "VTP_TEST_SEED": str(self.seed),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
