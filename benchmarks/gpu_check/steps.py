"""What the kinds of steps do. Each takes (check, step, until) and returns its result:
state ("ok", "FAILED", "unfinished" or "cannot run"), said (a line), and what it counted.

`until`, of time.monotonic, is when the step's share of the time is over.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.files import write_json
from benchmarks.gpu_check import counters, journal, running, sanitizers
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.sharing import Sharing
from benchmarks.identity import ROOT, library, note_built
from benchmarks.lost_device import DEVICE_LOST

MODELS = ("llava-1.5-7b", "llava-next-7b")
TRITON_CACHE = ROOT / "build" / "triton-cache.tar.gz"
LONGEST, LONGEST_UNDER_A_TOOL = 100.0, 150.0  # seconds of a test, the first one's start included
LONGEST_CELL = 90.0  # with rivals that compile at their first call
MOST_RUNS = 5  # of a command that loses its device and goes on


def cannot(why: str) -> dict:
    return {"state": "cannot run", "said": why}


# --- tests --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tests:
    """`workers` processes run `selection`, arguments of pytest; a rehearsal runs `most` of those
    that `rehearsed` selects."""

    selection: tuple[str, ...]
    rehearsed: tuple[str, ...]
    workers: int = 1
    most: int = 2
    tool: str | None = None  # of compute-sanitizer
    environment: Callable[[Check], dict[str, str]] = lambda check: {}

    def __call__(self, check: Check, step: str, until: float) -> dict:
        rehearsal = check.machine.rehearsal
        selection = list(self.rehearsed if rehearsal else ("-m", "gpu", *self.selection))
        prefix, extra, left_out = [], self.environment(check), None
        if self.tool is not None:
            program = sanitizers.find(path=check.environment()["PATH"])
            if program is None:
                return cannot("compute-sanitizer not found; set CUDA_HOME")
            prefix = sanitizers.prefix(program, self.tool)
            extra = extra | sanitizers.environment(self.tool)
            left_out = sanitizers.left_out(self.tool, sanitizers.version(program))
            if left_out is not None:
                selection = _without(selection, left_out)
        done = journal.done(check.entries.get(step, []))
        if self.tool is not None:  # without a summary, nothing is known of what was reported
            known = summarized(self.tool, check.folder(step))
            done = {test: worker for test, worker in done.items() if worker in known}
        sharing = Sharing(
            *(check, step, selection, check.machine.workers(1 if rehearsal else self.workers)),
            until,
            done=list(done),
            prefix=prefix,
            environment=extra,
            most=self.most if rehearsal else None,
            longest=LONGEST_UNDER_A_TOOL if self.tool else LONGEST,
            grace=10.0 if self.tool and not rehearsal else 2.0,
        )
        sharing.run()
        counted = journal.counts(check.entries.get(step, []))
        if self.tool is not None:
            ended = f"{check.calls}-"  # the processes of earlier calls may have been killed
            counted |= tool_counts(
                self.tool,
                outputs(check.folder(step)),
                lambda name: name in sharing.killed or not name.startswith(ended),
            )
        found = judge(counted, rehearsal)
        if left_out is not None:
            found["said"] += f"; without {left_out}, of which this version reports wrongly"
        return found | {"counts": counted, "command": sharing.command, "workers": sharing.wanted}


def _without(selection: list[str], op: str) -> list[str]:
    if "-k" not in selection:
        return [*selection, "-k", f"not {op}"]
    at = selection.index("-k") + 1
    return [*selection[:at], f"({selection[at]}) and not {op}", *selection[at + 1 :]]


def outputs(folder: Path) -> dict[str, str]:
    """Process -> what it printed, of all calls."""
    return {path.stem: path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))}


def summarized(tool: str, folder: Path) -> set[str]:
    """The processes, of all calls, that came to print their tool's summary."""
    return {
        name
        for name, text in outputs(folder).items()
        if sanitizers.reports(tool, text)["reports"] is not None
    }


def tool_counts(
    tool: str, outputs: dict[str, str], killed: Callable[[str], bool]
) -> dict[str, int | None]:
    """The sums over all processes. Those that were killed have no summary, and are counted by
    what they had shown; one that ended without a summary makes the sum None: nothing is known."""
    total: dict[str, int | None] = {}
    for name, output in outputs.items():
        found = sanitizers.reports(tool, output)
        if found["reports"] is None and killed(name):
            found = {"reports": sanitizers.shown(output)}
        for name, number in found.items():
            before = total.get(name, 0)
            total[name] = None if None in (number, before) else before + number
    return total or {"reports": None}


WRONG = ("failed", "crashed", "hung", "reports", "warnings", "unseen")


def judge(counted: dict[str, int | None], rehearsal: bool) -> dict:
    """The state, of the counts. What is missing is never taken for zero."""
    wrong = [f"{counted[name]} {name}" for name in WRONG if counted.get(name)]
    unknown = [name for name, number in counted.items() if number is None]
    passed, skipped, total = counted["passed"], counted["skipped"], counted["collected"]
    said = f"{passed} of {total} passed, {skipped} skipped"
    if wrong or unknown:
        return {"state": "FAILED", "said": ", ".join([said, *wrong, *(f"no {x}" for x in unknown)])}
    if counted["left"] or counted["stopped"]:
        unrun = counted["left"] + counted["stopped"]
        return {"state": "unfinished", "said": f"{said}, {unrun} had no time"}
    if not passed and not (rehearsal and skipped):
        return {"state": "FAILED", "said": f"{said}: nothing was shown"}
    return {"state": "ok", "said": said}


# --- the machine and the library ----------------------------------------------------------------


def look(check: Check, step: str, until: float) -> dict:
    """What machine this is: `check.found`, without which no other step runs."""
    log = check.folder(step) / "probe.log"
    command = [sys.executable, "-m", "benchmarks.gpu_check.probe", "--device", check.machine.device]
    status = running.run(command, log, check.environment(), until, check.tick)
    lines = log.read_text(errors="replace").splitlines()
    if status != 0 or not lines[-1].startswith("{"):
        said = "stopped after its time" if status is None else running.described(status)
        return cannot(f"the machine does not answer: {said}: {lines[-1][:300]}")
    check.found = json.loads(lines[-1])
    if check.found["device"] is None:
        return cannot(f"{check.found['why']}; nothing was checked")
    if not check.machine.rehearsal and shutil.which("nvidia-smi"):
        running.run(["nvidia-smi"], check.folder(step) / "smi.log", {}, until, check.tick)
    return {"state": "ok", "said": check.found["device"]}


def build(check: Check, step: str, until: float) -> dict:
    """The native library, where none was brought or it has no code for this GPU."""
    if not check.found["cannot_serve"]:
        return {"state": "ok", "said": f"was brought along: {library()}"}
    why = next(iter(check.found["cannot_serve"].values()))
    log = check.folder(step) / "build.log"
    command, environment = build_command(check)
    status = running.run(command, log, check.environment() | environment, until, check.tick)
    if status != 0:
        said = "stopped after its time" if status is None else running.described(status)
        return {"state": "FAILED", "said": f"{why}; and it was not built: {said}", "why": why}
    note_built()
    look(check, step, until)
    if reasons := check.found.get("cannot_serve", {"": "the machine does not answer"}):
        return {"state": "FAILED", "said": f"built, and yet: {next(iter(reasons.values()))}"}
    return {"state": "ok", "said": f"built here: {library()}", "built": True, "why": why}


def build_command(check: Check) -> tuple[list[str], dict[str, str]]:
    environment = {"MAX_JOBS": str(check.machine.cores), "VTP_BUILD": "cpu"}
    if not check.machine.rehearsal:
        environment |= {"VTP_BUILD": "cuda", "VTP_CUDA_ARCHS": check.found["capability"]}
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment


# --- benchmarks ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells that carry goals; `plain`: ours alone, with launches that do not overlap."""

    plain: bool = False

    def __call__(self, check: Check, step: str, until: float) -> dict:
        file = check.out / ("bench-plain_launches.json" if self.plain else "bench.json")
        command = [sys.executable, "-m", "benchmarks", "--goals", "--device", check.machine.device]
        command += ["--turns", "2", "--tiny"] if check.machine.rehearsal else ["--turns", "5"]
        command += ["--json", str(file), "--resume"] + (["--alone"] if self.plain else [])
        extra = {"VTP_DEPENDENT_LAUNCH": "0"} if self.plain else {}
        _try_failed_cells_again(file)
        status = _to_the_end(check, step, command, extra, file, until)
        if not file.exists():
            return {"state": "FAILED", "said": f"no cell: {_said(status)}", "command": command}
        return judge_cells(json.loads(file.read_text()), status) | {"command": command}


def judge_cells(found: dict, status: int | None) -> dict:
    met = [row["goal_met"] for row in found["rows"] if row["goal_met"] is not None]
    counted = {"cells": len(found["rows"]), "failed": len(found["failed"]), "goals": len(met)}
    result = {"counts": counted | {"goals_met": met.count(True)}}
    said = f"{len(found['rows'])} cells"
    said += f", {met.count(True)} of {len(met)} goals met" if met else ""
    if found["failed"]:
        first = found["failed"][0]
        why = f"{len(found['failed'])} failed, first {first['op']}, {first['shape']}"
        return result | {"state": "FAILED", "said": f"{said}; {why}"}
    if status is None:
        return result | {"state": "unfinished", "said": f"{said}; its time was over"}
    return result | {"state": "FAILED" if status else "ok", "said": _behind(said, status)}


def _try_failed_cells_again(file: Path) -> None:
    """A later call does: what failed may have been the machine."""
    if file.exists():
        found = json.loads(file.read_text())
        write_json(file, found | {"failed": [], "running": None})


def _to_the_end(
    check: Check, step: str, command: list[str], extra: dict[str, str], file: Path, until: float
) -> int | None:
    """Runs a command that goes on where it was, again if it lost its device, crashed, or has
    written nothing to its file for longer than a cell takes."""
    log = check.folder(step) / "benchmarks.log"
    for _ in range(MOST_RUNS):
        alive = Alive(file, LONGEST_CELL)
        try:
            status = running.run(
                *(command, log, check.environment() | extra),
                *(until, lambda a=alive: (check.tick(), a())),
            )
        except Hung:
            status = DEVICE_LOST
        if status is None or (status != DEVICE_LOST and status >= 0):
            return status
    return status


class Hung(Exception):
    pass


class Alive:
    """Raises Hung if a file has not changed for so many seconds."""

    def __init__(self, file: Path, longest: float) -> None:
        self.file, self.longest = file, longest
        self.changed, self.since = self._stamp(), time.monotonic()

    def __call__(self) -> None:
        now = self._stamp()
        if now != self.changed:
            self.changed, self.since = now, time.monotonic()
        elif time.monotonic() - self.since > self.longest:
            raise Hung

    def _stamp(self) -> int | None:
        return self.file.stat().st_mtime_ns if self.file.exists() else None


def _said(status: int | None) -> str:
    return running.described(status) if status is not None else "its time was over"


def _behind(said: str, status: int) -> str:
    """With how a command ended, if that says anything."""
    return f"{said}; {running.described(status)}" if status else said


@dataclasses.dataclass(frozen=True)
class EndToEnd:
    """A model with random weights, dense and pruned: SDPA beside every method."""

    model: str

    def __call__(self, check: Check, step: str, until: float) -> dict:
        file = check.out / f"end_to_end-{self.model}.json"
        rehearsal = check.machine.rehearsal
        batches = ["1", "2"] if rehearsal else ["1", "8"]
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--model", self.model]
        command += ["--random-weights", "--device", check.machine.device, "--batch", *batches]
        command += ["--repeats", "1" if rehearsal else "3"]
        command += ["--decode-steps", "1" if rehearsal else "8", "--json", str(file), "--resume"]
        command += ["--tiny"] if rehearsal else []
        log = check.folder(step) / "end_to_end.log"
        status = running.run(command, log, check.environment(), until, check.tick)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        measured = {row["batch"] for row in rows}
        said = f"{len(rows)} rows, {len(measured)} of {len(batches)} batch sizes"
        result = {"counts": {"rows": len(rows)}, "command": command}
        if status is None:
            return result | {"state": "unfinished", "said": f"{said}; its time was over"}
        state = "ok" if status == 0 and len(measured) == len(batches) else "FAILED"
        return result | {"state": state, "said": _behind(said, status)}


def compile_stack(check: Check, step: str, until: float) -> dict:
    """The decoder stack of a model with random weights as it is and as a CUDA graph, dense and
    pruned."""
    file, log = check.out / "compiled.json", check.folder(step) / "compiled.log"
    rehearsal = check.machine.rehearsal
    model = ["16x1024", "--tiny"] if rehearsal else ["llava-1.5-7b"]
    command = [sys.executable, "-m", "benchmarks.compiled", "--device", check.machine.device]
    command += ["--model", *model, "--batch", "1", "--turns", "3" if rehearsal else "7"]
    command += ["--json", str(file)]
    status = running.run(command, log, check.environment(), until, check.tick)
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    result = {"counts": {"rows": len(rows)}, "command": command}
    if status is None:
        return result | {"state": "unfinished", "said": f"{len(rows)} rows; its time was over"}
    state = "ok" if status == 0 and len(rows) == 4 else "FAILED"
    return result | {"state": state, "said": _behind(f"{len(rows)} of 4 rows", status)}


# --- ncu ----------------------------------------------------------------------------------------


def count(check: Check, step: str, until: float) -> dict:
    """Counters of the kernels of nine ops."""
    program = sanitizers.find("ncu", check.environment()["PATH"])
    if program is None:
        return cannot("ncu not found; set CUDA_HOME")
    device, capability = check.machine.device, check.found.get("capability") or "9.0"
    calls = [sys.executable, "-m", "benchmarks.gpu_check.counters", "--device", device]
    calls += ["--tiny"] if check.machine.rehearsal else []
    for tried, asked in enumerate(counters.choices(program, capability)):
        log = check.folder(step) / f"ncu-{tried}.log"
        log.unlink(missing_ok=True)
        command = [*counters.prefix(program, asked), *calls]
        status = running.run(command, log, check.environment(), until, check.tick)
        launches = counters.parse(log.read_text(errors="replace"))
        if launches or status is None:
            break
    result = {"launches": launches, "metrics": list(asked), "command": command}
    missing = [name for name in counters.METRICS if name not in asked]
    said = f"{len(launches)} launches, {len(asked)} metrics"
    said += f", not {', '.join(missing)}" if missing else ""
    if status is None:
        return result | {"state": "unfinished", "said": f"{said}; its time was over"}
    ok = status == 0 and all(launch.get(asked[0]) is not None for launch in launches) and launches
    return result | {"state": "ok" if ok else "FAILED", "said": _behind(said, status)}


# --- Triton -------------------------------------------------------------------------------------


def triton_environment(check: Check) -> dict[str, str]:
    """Triton's cache: what was compiled beforehand, if that was brought along."""
    from benchmarks.gpu_check.triton_cache import unpack

    folder = check.temporary / "triton"
    if TRITON_CACHE.exists() and not folder.exists():
        unpack(TRITON_CACHE, folder)
    return {"TRITON_CACHE_DIR": str(folder)}
