"""gpu-check without a GPU: its plan rehearsed, its processes killed, its parsers, the GPU tests."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import harness, identity
from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check import counters, journal, running, sanitizers, steps, triton_cache
from benchmarks.gpu_check.check import Check, Machine
from benchmarks.gpu_check.journal import Journal
from benchmarks.gpu_check.plan import STEPS, Step
from benchmarks.gpu_check.sharing import Sharing
from emulator import build as emulator
from emulator import serving
from vtp_kernels import _native, reference

ROOT = Path(__file__).parents[1]
STAND_INS = ROOT / "tests" / "gpu" / "stand_ins"
NAMES = [step.name for step in STEPS]


# --- the whole plan -----------------------------------------------------------------------------


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
def test_the_whole_plan_is_rehearsed(tmp_path):
    """Every step by the very code that a GPU would see; on a CPU, with tiny shapes."""
    if serving.why_not() is None:
        emulator.build("plain")  # by whichever test comes first, and not in the plan's time
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--budget", "400"]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["ok"] and result["rehearsal"] and list(result["steps"]) == NAMES
    assert result["machine"]["cpu"] and result["versions"]["torch"] == torch.__version__
    assert result["steps"]["small-inputs"]["counts"]["passed"] == 8
    assert result["steps"]["racecheck"]["counts"]["reports"] == 0
    assert result["steps"]["ncu"]["launches"][0]["dram__bytes_read.sum"] == 234.5
    assert "without passive_attention" in result["steps"]["memcheck"]["said"]
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert len(bench["rows"]) == 22 and not bench["failed"] and bench["running"] is None
    assert bench["launch_gap_seconds"] > 0 and bench["copy_bytes_per_second"] > 0
    plain = json.loads((tmp_path / "bench-plain_launches.json").read_text())
    assert len(plain["rows"]) == 22 and not any(row["speedup"] for row in plain["rows"])
    for model in steps.MODELS:
        rows = json.loads((tmp_path / f"end_to_end-{model}.json").read_text())["rows"]
        assert {row["batch"] for row in rows} == {1, 2} and rows[0]["method"] == "dense"
        assert all("(tiny)" in row["model"] for row in rows)
    rows = json.loads((tmp_path / "compiled.json").read_text())["rows"]
    assert [(row["graph_breaks"], row["compilations"]) for row in rows] == [(0, 0), (0, 1)] * 2
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        packed = archive.getnames()
    tested = [step.name for step in STEPS if isinstance(step.run, steps.Tests)]
    assert {f"{name}/junit.xml" for name in tested} <= set(packed)
    assert len(list(tmp_path.iterdir())) <= 8  # as many as come back from such a machine


def test_the_plan_begins_with_what_tells_most():
    assert NAMES[:4] == ["machine", "library", "small-inputs", "benchmarks"]
    assert len(set(NAMES)) == len(NAMES)
    for step in STEPS:
        for name in (*getattr(step.run, "selection", ()), *getattr(step.run, "rehearsed", ())):
            file = name.removeprefix("--ignore=")
            assert not file.startswith("tests/") or (ROOT / file).exists(), file


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: gpu-check would run")
def test_without_a_gpu_it_claims_nothing(tmp_path, capsys):
    assert program.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device; nothing was checked" in capsys.readouterr().err
    result = json.loads((tmp_path / "check.json").read_text())
    assert not result["ok"] and result["steps"]["small-inputs"] == {"state": "not run"}


def test_too_short_a_budget_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["--budget", "3"])
    assert "--budget: expected at least 30 seconds" in capsys.readouterr().err


def test_on_a_gpu_the_plan_runs_these_commands(tmp_path, monkeypatch, capsys):
    """What a rehearsal cannot show: nothing is run, but all that would be is put together."""
    commands = {}
    found = {"device": "NVIDIA H200", "capability": "9.0", "cannot_serve": {"inflection": "no"}}

    def run(command, log, environment, until, tick):
        commands.setdefault(log.parent.name, []).append((command, environment))
        built = "setup.py" in str(commands.get("library", ""))
        said = json.dumps(found | ({"cannot_serve": {}} if built else {}))
        log.write_text(said if log.name == "probe.log" else "")
        return 0

    def share(self):
        commands[self.step] = [(self.command, self.environment)]

    monkeypatch.setattr(steps.running, "run", run)
    monkeypatch.setattr(Sharing, "run", share)
    monkeypatch.setattr(identity, "BUILT", tmp_path / "built")
    monkeypatch.setattr(sanitizers, "find", lambda name="compute-sanitizer", path=None: f"/{name}")
    check = Check(tmp_path / "out", Machine(False, cores=16), NAMES, 480.0)
    assert program.run(check, STEPS, time.monotonic() + 480) == 1
    check.close()
    said = capsys.readouterr().out
    assert "gpu-check itself" not in said
    assert "built here" in said  # and nothing else is ok: no test was seen to pass
    assert [name for name in NAMES if check.is_ok(name)] == ["machine", "library"]
    assert list(commands) == NAMES

    def words(step):
        return " ".join(commands[step][-1][0])

    build = commands["library"][0][1]
    assert build["VTP_CUDA_ARCHS"] == "9.0" and build["MAX_JOBS"] == "16"
    for step in STEPS:
        if isinstance(step.run, steps.Tests):
            assert " -m gpu tests/" in words(step.name), step.name
            assert commands[step.name][0][1]["VTP_GPU_REHEARSAL"] == ""
    assert "--tool racecheck" in words("racecheck") and "65 or 200" in words("racecheck")
    assert words("memcheck").endswith("-k not passive_attention")
    for step in ("benchmarks", *(name for name in NAMES if name.startswith("end-to-end"))):
        assert "--device cuda" in words(step) and "--tiny" not in words(step)
    assert commands["plain-launches"][0][1]["VTP_DEPENDENT_LAUNCH"] == "0"
    assert "VTP_DEPENDENT_LAUNCH" not in commands["benchmarks"][0][1]
    assert "--batch 1 8" in words("end-to-end-llava-next-7b")
    assert "--clock-control none" in words("ncu") and words("ncu").endswith("--device cuda")
    assert commands["triton"][0][1]["TRITON_CACHE_DIR"]


# --- a plan of fakes ----------------------------------------------------------------------------


@pytest.fixture
def checked(tmp_path):
    """A function that makes a check of some steps."""
    made = []

    def make(*names, **options):
        found = Check(tmp_path / "out", Machine(True, cores=2), list(names), 60.0, **options)
        made.append(found)
        return found

    yield make
    for found in made:
        found.close()


def fake(name, result=None, ran=None, share=1.0, **options):
    def run(check, step, until):
        if ran is not None:
            ran.append((step, until - time.monotonic()))
        if isinstance(result, Exception):
            raise result
        return dict(result or {"state": "ok", "said": "done"})

    return Step(name, share, "a fake", run, **options)


def test_a_step_that_cannot_run_says_why_and_the_next_goes_on(checked, capsys):
    ran = []
    broken, missing = ValueError("no such thing"), steps.cannot("ncu not found; set CUDA_HOME")
    plan = (fake("machine"), fake("a", broken), fake("b", missing), fake("c", ran=ran))
    check = checked("machine", "a", "b", "c")
    assert program.run(check, plan, time.monotonic() + 30) == 1
    assert [name for name, _ in ran] == ["c"]
    said = capsys.readouterr().out
    assert "gpu-check itself: ValueError: no such thing" in said
    assert "cannot run" in said and "ncu not found" in said
    stored = json.loads((check.out / "check.json").read_text())
    assert not stored["ok"] and stored["steps"]["c"]["state"] == "ok"


def test_time_that_is_not_needed_goes_to_later_steps(checked):
    ran, shares = [], {"a": 6, "b": 3, "c": 1}
    plan = tuple(fake(name, ran=ran, share=share) for name, share in shares.items())
    assert program.run(checked(*"abc"), plan, time.monotonic() + 10) == 0
    given = dict(ran)
    assert given["a"] == pytest.approx(6, abs=0.5)
    assert given["b"] == pytest.approx(9, abs=0.5) and given["c"] == pytest.approx(10, abs=0.5)


def test_a_plan_whose_time_is_over_stops(checked, capsys):
    assert program.run(checked("a"), (fake("a"),), time.monotonic() - 1) == 1
    assert "not run" in capsys.readouterr().out


def test_steps_that_are_done_are_not_repeated(checked):
    ran = []
    plan = (
        fake("machine", ran=ran, every_call=True),
        fake("a", ran=ran),
        fake("b", {"state": "FAILED", "said": ""}),
    )
    names = [step.name for step in plan]
    assert program.run(checked(*names), plan, time.monotonic() + 30) == 1
    plan = (*plan[:2], fake("b", ran=ran))
    assert program.run(checked(*names, resume=True), plan, time.monotonic() + 30) == 0
    assert [name for name, _ in ran] == ["machine", "a", "machine", "b"]
    program.run(checked(*names), plan, time.monotonic() + 30)  # and all of them without --resume
    assert [name for name, _ in ran][4:] == ["machine", "a", "b"]


def test_starting_anew_leaves_files_of_others_alone(checked, tmp_path):
    (tmp_path / "out").mkdir()
    theirs, ours = tmp_path / "out" / "letters.json", tmp_path / "out" / "end_to_end-x.json"
    for path in (theirs, ours):
        path.write_text("{}")
    checked("a")
    assert theirs.exists() and not ours.exists()


def test_packages_that_were_brought_along_are_found(checked, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    assert checked("a").environment()["PYTHONPATH"] == f"{ROOT}:/tmp/site"


def test_results_of_other_sources_are_dropped(checked, monkeypatch, capsys):
    program.run(checked("a"), (fake("a"),), time.monotonic() + 30)
    whose = identity.identity()
    monkeypatch.setattr("benchmarks.gpu_check.check.identity", lambda: whose | {"sources": "other"})
    assert checked("a", resume=True).results == {}
    assert "of other sources or another machine: starting anew" in capsys.readouterr().out


def test_a_library_that_was_built_there_may_differ(checked, monkeypatch):
    built = {"state": "ok", "said": "built here", "built": True}
    program.run(checked("a"), (fake("a", built),), time.monotonic() + 30)
    whose = identity.identity()
    monkeypatch.setattr("benchmarks.gpu_check.check.identity", lambda: whose | {"library": None})
    assert checked("a", resume=True).results["a"]["state"] == "ok"


# --- tests that are shared between processes ----------------------------------------------------


TESTS = """
import os, signal, time
import pytest

def note(word):
    with open({notes!r}, "a") as file:
        file.write(word + " ")

@pytest.fixture(scope="module")
def shared():
    note("setup")
    yield
    note("teardown")

@pytest.mark.parametrize("i", range(6))
def test_passes(shared, i):
    note(f"pass{{i}}")
    time.sleep(0.02)
"""
BAD = """
def test_fails():
    assert 1 == 2, "one is not two"

def test_is_skipped():
    pytest.skip("no such thing here")

def test_crashes():
    if not os.path.exists({notes!r} + ".mended"):
        os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs():
    if not os.path.exists({notes!r} + ".mended"):
        time.sleep(60)

def test_comes_last():
    note("last")
"""


@pytest.fixture
def written(tmp_path):
    """A function that writes a file of tests; notes are what these do."""
    notes = tmp_path / "notes"

    def write(text):
        (tmp_path / "test_written.py").write_text(text.format(notes=str(notes)))
        return [str(tmp_path / "test_written.py")]

    return SimpleNamespace(write=write, notes=lambda: notes.read_text().split(), path=notes)


def share(check, selection, seconds=30.0, workers=2, **options):
    done = list(journal.done(check.entries.get("s", [])))
    until = time.monotonic() + seconds
    sharing = Sharing(check, "s", selection, workers, until, done=done, **options)
    sharing.run()
    entries = journal.outcomes(check.entries["s"]).items()
    return {test.split("::")[-1]: entry for test, entry in entries}


def test_processes_share_the_tests_between_them(checked, written):
    check = checked("s")
    found = share(check, written.write(TESTS))
    assert [entry["outcome"] for entry in found.values()] == ["passed"] * 6
    assert sorted(x for x in written.notes() if x.startswith("pass")) == [
        f"pass{i}" for i in range(6)
    ]
    assert journal.counts(check.entries["s"])["left"] == 0
    assert written.notes().count("setup") == written.notes().count("teardown") <= 2


def test_what_crashes_or_hangs_costs_itself_alone(checked, written):
    check = checked("s")
    found = share(check, written.write(TESTS + BAD), longest=3.0)
    assert found["test_crashes"]["outcome"] == "crashed"
    assert "ended by SIGSEGV" in found["test_crashes"]["message"]
    assert found["test_hangs"]["outcome"] == "hung"
    assert "one is not two" in found["test_fails"]["message"]
    assert found["test_is_skipped"]["outcome"] == "skipped"
    assert found["test_comes_last"]["outcome"] == "passed"
    counted = journal.counts(check.entries["s"])
    assert counted["passed"] == 7 and counted["left"] == 0
    judged = steps.judge(counted, rehearsal=False)
    assert judged["state"] == "FAILED" and "1 failed, 1 crashed, 1 hung" in judged["said"]
    check.write()
    suite = ElementTree.parse(check.folder("s") / "junit.xml").getroot()[0]
    assert suite.attrib["tests"] == "11" and suite.attrib["failures"] == "1"
    assert suite.attrib["errors"] == "2" and suite.attrib["skipped"] == "1"

    # a second call runs what did not pass, and no more
    written.path.write_text("")
    written.path.with_name("notes.mended").touch()
    again = checked("s", resume=True)
    found = share(again, written.write(TESTS + BAD), longest=3.0)
    assert found["test_crashes"]["outcome"] == found["test_hangs"]["outcome"] == "passed"
    assert found["test_fails"]["outcome"] == "failed" and written.notes() == []


def test_no_test_begins_when_the_time_is_over(checked, written):
    slow = TESTS.replace("range(6)", "range(40)").replace("0.02", "1")
    check = checked("s")
    share(check, written.write(slow), seconds=6.0, workers=1, grace=2.0)
    counted = journal.counts(check.entries["s"])
    assert counted["passed"] and counted["left"] and not counted["stopped"]
    assert steps.judge(counted, rehearsal=False)["state"] == "unfinished"


def test_a_file_that_does_not_import_is_a_failure(checked, written):
    check = checked("s")
    share(check, written.write("import no_such_module"), workers=1)
    counted = journal.counts(check.entries["s"])
    assert counted["failed"] == 1 and steps.judge(counted, rehearsal=False)["state"] == "FAILED"


KILLED = """
import sys, time
from pathlib import Path
from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check.check import Check, Machine
from benchmarks.gpu_check.plan import Step
from benchmarks.gpu_check.steps import Tests

def look(check, step, until):
    return {"state": "ok", "said": "here"}

plan = (Step("machine", 1, "", look), Step("s", 9, "", Tests((), (sys.argv[1],), most=99)))
check = Check(Path(sys.argv[2]), Machine(True, 1), ["machine", "s"], 60, "--resume" in sys.argv)
status = program.run(check, plan, time.monotonic() + 60)
check.close()
sys.exit(status)
"""


def test_whoever_is_killed_loses_what_was_running(tmp_path, written):
    slow = TESTS.replace("0.02", "0.5")
    command = [sys.executable, "-c", KILLED, *written.write(slow), str(tmp_path / "out")]
    lines = tmp_path / "out" / "journal.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count('"passed"') >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # in which a process that was left over would go on
    kept = lines.read_text()
    passed = kept.count('"passed"')
    assert not json.loads((tmp_path / "out" / "check.json").read_text())["ok"]
    before = written.notes()
    time.sleep(1.0)
    assert lines.read_text() == kept and written.notes() == before  # nothing was left over
    with lines.open("a") as file:
        file.write('{"step": "s", "test": "torn')
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "check.json").read_text())["ok"]
    ran = [word for word in written.notes() if word.startswith("pass")]
    assert set(ran) == {f"pass{i}" for i in range(6)}
    assert len(ran) <= 6 + 1 and passed >= 2  # the one that was running ran again


def ends(process):
    """Whether it does so soon: nobody waits for a process of a process that was killed."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = (Path("/proc") / process / "stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_command_is_ended_at_its_time_with_all_that_it_started(tmp_path):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); "
    command = [sys.executable, "-c", code + "time.sleep(60)"]
    log, start = tmp_path / "log", time.monotonic()
    assert running.run(command, log, {}, start + 2, lambda: None) is None
    assert time.monotonic() - start < 20
    assert ends(log.read_text().split()[-1])
    assert running.run(["true"], log, {}, time.monotonic() + 9, lambda: None) == 0
    failed = running.run(["sh", "-c", "kill -9 $$"], log, {}, time.monotonic() + 9, lambda: None)
    assert running.described(failed) == "ended by SIGKILL"


# --- the journal --------------------------------------------------------------------------------


def test_lines_are_read_once_and_torn_ones_passed_over(tmp_path):
    lines = Journal(tmp_path / "journal.jsonl")
    assert lines.new() == []
    lines.add(step="a", test="t", outcome="started")
    with lines.path.open("a") as file:
        file.write('{"step": "a", "te')
    assert [entry["outcome"] for entry in lines.new()] == ["started"]
    lines.mend()
    lines.add(step="a", test="t", outcome="passed")
    assert [entry["outcome"] for entry in lines.new()] == ["passed"]


def test_control_characters_do_not_break_junit(tmp_path):
    entry = {"test": "a.py::t", "outcome": "failed", "message": "\x1b[31mred\x00"}
    journal.write_junit(tmp_path / "junit.xml", "s", [entry])
    failure = ElementTree.parse(tmp_path / "junit.xml").getroot()[0][0][0]
    assert failure.tag == "failure" and failure.text == "[31mred"


@pytest.mark.parametrize(
    "changed, state",
    [
        ({}, "ok"),
        ({"failed": 1}, "FAILED"),
        ({"crashed": 1}, "FAILED"),
        ({"hung": 1}, "FAILED"),
        ({"reports": 3}, "FAILED"),
        ({"reports": None}, "FAILED"),
        ({"warnings": 1}, "FAILED"),
        ({"unseen": 1}, "FAILED"),
        ({"collected": None, "left": None}, "FAILED"),
        ({"passed": 0, "skipped": 5}, "FAILED"),
        ({"passed": 0}, "FAILED"),
        ({"left": 4}, "unfinished"),
        ({"stopped": 1}, "unfinished"),
        ({"others": 7}, "ok"),
    ],
)
def test_a_step_is_judged_by_its_counts(changed, state):
    counted = dict.fromkeys(journal.ENDED, 0) | {"collected": 5, "passed": 5, "left": 0} | changed
    assert steps.judge(counted, rehearsal=False)["state"] == state


# --- compute-sanitizer --------------------------------------------------------------------------


UNINITIALIZED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {kernel}<float>(T1 *)+0x60
=========     by thread (122,0,0) in block (0,0,0)
=========     Address 0x7f936fa001e8
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: vtp::cuda::select_topk [0x55] in _C.abi3.so
=========
"""
OURS = UNINITIALIZED.format(kernel="vtp::cuda::<unnamed>::select_kernel")
TORCH = UNINITIALIZED.format(kernel="at::native::elementwise_kernel")
HAZARDS = "========= RACECHECK SUMMARY: "


@pytest.mark.parametrize(
    "tool, text, reports",
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", {"reports": 0}),
        ("synccheck", "========= ERROR SUMMARY: 1 error\n", {"reports": 1}),
        (
            "memcheck",
            "========= ERROR SUMMARY: 1200 errors\n"
            + "========= ERROR SUMMARY: 200 errors were not printed. Use --print-limit option\n",
            {"reports": 1200},
        ),
        ("memcheck", "185 passed\n", {"reports": None}),
        (
            "racecheck",
            HAZARDS + "0 hazards displayed (0 errors, 0 warnings)\n",
            {"reports": 0, "warnings": 0},
        ),
        (
            "racecheck",
            HAZARDS + "1 hazard displayed (1 error, 2 warnings)\n",
            {"reports": 1, "warnings": 2},
        ),
        ("racecheck", "========= ERROR SUMMARY: 0 errors\n", {"reports": None, "warnings": None}),
        (
            "initcheck",
            TORCH + OURS + TORCH + "========= ERROR SUMMARY: 3 errors\n",
            {"reports": 1, "others": 2, "unseen": 0},
        ),
        (
            "initcheck",
            TORCH + "========= ERROR SUMMARY: 1001 errors\n",
            {"reports": 0, "others": 1, "unseen": 1},
        ),
    ],
)
def test_counts_reports(tool, text, reports):
    assert sanitizers.reports(tool, "========= COMPUTE-SANITIZER\n" + text) == reports


def test_counts_of_several_processes():
    clean, dirty = "========= ERROR SUMMARY: 0 errors\n", "========= ERROR SUMMARY: 2 errors\n"

    def count(*outputs, killed=()):
        named = {str(i): output for i, output in enumerate(outputs)}
        return steps.tool_counts("memcheck", named, lambda name: name in killed)

    assert count(clean, dirty, dirty) == {"reports": 4}
    assert count(clean, "no summary") == {"reports": None}
    assert count(clean, OURS, killed="1") == {"reports": 1}
    assert count() == {"reports": None}


@pytest.mark.parametrize("tool", sanitizers.TOOLS)
def test_sanitizer_commands(tool):
    options = sanitizers.prefix("compute-sanitizer", tool)
    assert options[:3] == ["compute-sanitizer", "--tool", tool]
    assert ("kns=_ZN3vtp4cuda" in options) == (tool != "initcheck")
    assert ("--padding" in options) == (tool == "memcheck")
    old, new = (2025, 3, 0, 0), (2026, 4, 0, 0)
    misled = "passive_attention" if tool in ("memcheck", "initcheck") else None
    assert sanitizers.left_out(tool, old) == sanitizers.left_out(tool, ()) == misled
    assert sanitizers.left_out(tool, new) is None
    assert steps._without(["f.py"], "op") == ["f.py", "-k", "not op"]
    assert steps._without(["f.py", "-k", "a or b"], "op") == ["f.py", "-k", "(a or b) and not op"]


def test_the_sanitizer_is_found_in_the_toolkit(tmp_path, monkeypatch, checked):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizers.find() is None
    check = checked("racecheck")
    monkeypatch.setattr(check, "environment", lambda: {"PATH": ""})
    for run in (steps.count, steps.Tests((), (), tool="racecheck")):
        result = run(check, "racecheck", time.monotonic() + 1)
        assert result["state"] == "cannot run" and "not found; set CUDA_HOME" in result["said"]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.symlink_to(STAND_INS / "compute-sanitizer")
    assert sanitizers.find() == str(tool)
    monkeypatch.undo()
    assert sanitizers.version(str(tool)) == (2025, 3, 0, 0)
    assert sanitizers.version("/no/such/tool") == ()


def test_a_race_fails_its_step(checked, written, monkeypatch):
    monkeypatch.setenv("VTP_STAND_IN", "race")
    one = steps.Tests((), tuple(written.write("def test_it(): pass")), tool="racecheck")
    check = checked("racecheck")
    result = one(check, "racecheck", time.monotonic() + 30)
    assert result["state"] == "FAILED" and "1 reports" in result["said"]
    check.pack()
    assert result["counts"]["passed"] == 1
    monkeypatch.delenv("VTP_STAND_IN")  # and a later call does not forget it
    again = checked("racecheck", resume=True)
    result = one(again, "racecheck", time.monotonic() + 30)
    assert result["state"] == "FAILED" and result["counts"]["reports"] == 1


def test_tests_of_a_process_without_a_summary_are_run_again(checked, written):
    """It may have been killed before it came to tell what it saw."""
    text = "def test_it():\n    with open({notes!r}, 'a') as file:\n        file.write('ran ')"
    one = steps.Tests((), tuple(written.write(text)), tool="memcheck")
    check = checked("memcheck")
    assert one(check, "memcheck", time.monotonic() + 30)["state"] == "ok"
    assert written.notes() == ["ran"]
    one(check, "memcheck", time.monotonic() + 30)
    assert written.notes() == ["ran"]
    for log in check.folder("memcheck").glob("*.log"):
        log.write_text(log.read_text().replace("SUMMARY", ""))
    check.pack()
    again = checked("memcheck", resume=True)
    assert one(again, "memcheck", time.monotonic() + 30)["state"] == "ok"
    assert written.notes() == ["ran", "ran"]


# --- ncu ----------------------------------------------------------------------------------------


def test_what_ncu_prints_is_read(checked, monkeypatch):
    assert counters.parse("==ERROR== no table\n") == []
    asked = counters.known(str(STAND_INS / "ncu"), "gh100")
    assert "gpu__time_duration.sum" in asked and "launch__registers_per_thread" in asked
    assert "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active" not in asked
    assert counters.known("/no/such/ncu", "gh100") == counters.METRICS
    command = [*counters.prefix(str(STAND_INS / "ncu"), counters.SURE), "echo", "hello"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, second, _ = counters.parse(text)
    assert "select_kernel" in first["kernel"] and set(counters.SURE) < set(first)
    assert second["dram__bytes_read.sum"] == 1234.5  # "1,234.5"


def test_a_metric_that_ncu_does_not_know_costs_no_more_than_itself(checked, monkeypatch):
    monkeypatch.setenv("VTP_STAND_IN", "unknown-metric")
    monkeypatch.setattr(sys, "executable", "true")  # in place of the calls
    check = checked("ncu")
    result = steps.count(check, "ncu", time.monotonic() + 30)
    assert result["state"] == "ok" and set(counters.SURE) < set(result["metrics"])
    assert len(result["metrics"]) == 7 and "sm__pipe_tensor_cycles" in result["said"]


# --- the library, and Triton's cache ------------------------------------------------------------


def test_the_library_is_built_where_it_is_missing(checked, monkeypatch, tmp_path):
    check = checked("library")
    check.found = {"cannot_serve": {}}
    assert "brought along" in steps.build(check, "library", time.monotonic() + 9)["said"]
    check.found = {"cannot_serve": {"select_topk": "no image"}, "capability": "9.0"}
    command, environment = steps.build_command(check)
    assert command[1:] == ["setup.py", "-q", "build_ext", "--inplace"]
    assert environment == {"MAX_JOBS": "2", "VTP_BUILD": "cpu"}
    check.machine = Machine(False, cores=16)
    _, environment = steps.build_command(check)
    assert environment == {"MAX_JOBS": "16", "VTP_BUILD": "cuda", "VTP_CUDA_ARCHS": "9.0"}

    monkeypatch.setattr(steps, "build_command", lambda check: (["false"], {}))
    result = steps.build(check, "library", time.monotonic() + 9)
    assert result["state"] == "FAILED" and "no image; and it was not built" in result["said"]

    def looks_again(check, step, until):
        check.found = {"cannot_serve": {}}

    monkeypatch.setattr(steps, "build_command", lambda check: (["true"], {}))
    monkeypatch.setattr(steps, "look", looks_again)
    monkeypatch.setattr(identity, "BUILT", tmp_path / "built")
    result = steps.build(check, "library", time.monotonic() + 9)
    assert result["state"] == "ok" and result["built"]
    if identity._library_digest() is not None:
        assert identity.library() == "built from these sources"


def test_a_carried_cache_is_found_by_triton(tmp_path):
    """Triton's lists of files name them with their folder, which is another one there."""
    made = tmp_path / "made" / "KEY"
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_bytes(b"code")
    names = {"child_paths": {"kernel.cubin": str(made / "kernel.cubin")}}
    (made / "__grp__kernel.json").write_text(json.dumps(names))
    triton_cache.pack(tmp_path / "made", tmp_path / "cache.tar.gz")
    assert triton_cache.unpack(tmp_path / "cache.tar.gz", tmp_path / "there") == 1
    there = tmp_path / "there" / "KEY"
    found = json.loads((there / "__grp__kernel.json").read_text())["child_paths"]
    assert found == {"kernel.cubin": str(there / "kernel.cubin")}
    assert Path(found["kernel.cubin"]).read_bytes() == b"code"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_kernels_are_compiled_beforehand(tmp_path):
    archive = tmp_path / "cache.tar.gz"
    command = [sys.executable, "-m", "benchmarks.gpu_check.triton_cache", "compact_rows"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([*command, "--jobs", "1", "--out", archive], check=True, env=environment)
    assert triton_cache.unpack(archive, tmp_path / "there") > 0
    assert list((tmp_path / "there").rglob("*.cubin"))


def test_benchmarks_go_on_after_a_crash(checked, monkeypatch):
    """Once for every cell that takes its process down, and with the cells that are left."""
    check, calls = checked("benchmarks"), []
    ends = [-signal.SIGSEGV, steps.DEVICE_LOST, 0]

    def run(command, log, environment, until, tick):
        calls.append(command)
        rows = [{"goal_met": None}] * len(calls)
        (check.out / "bench.json").write_text(json.dumps({"rows": rows, "failed": []}))
        return ends[len(calls) - 1]

    monkeypatch.setattr(steps.running, "run", run)
    result = steps.Cells()(check, "benchmarks", time.monotonic() + 9)
    assert result["state"] == "ok" and result["counts"]["cells"] == 3
    assert all("--resume" in command and "--goals" in command for command in calls)


def test_a_cell_that_hangs_is_ended(tmp_path):
    file = tmp_path / "bench.json"
    alive = steps.Alive(file, 0.2)
    alive()
    time.sleep(0.15)
    file.write_text("{}")
    alive()
    time.sleep(0.15)
    alive()
    time.sleep(0.1)
    with pytest.raises(steps.Hung):
        alive()


# --- the clock of a GPU, by a fake one ----------------------------------------------------------


@pytest.fixture
def fake_clock(monkeypatch):
    """A device on which an op takes a microsecond; a graph remembers how many it has captured."""
    device = SimpleNamespace(now=0.0, queued=0, capturing=None, strict=False)

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        calls = 0

        def replay(self):
            device.now += 1e-3 * self.calls

    @contextlib.contextmanager
    def capture(graph):
        device.capturing = graph
        yield
        device.capturing = None

    def op(x):
        if device.capturing is not None:
            device.capturing.calls += 1
        else:
            device.now += 1e-3

    def waiting_op(x):
        assert device.capturing is None
        if device.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        device.now += 5e-3

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "set_sync_debug_mode": lambda mode: setattr(device, "strict", mode == "error"),
        "get_device_properties": lambda name: SimpleNamespace(L2_cache_size=50 * 2**20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    device.op, device.waiting_op = op, waiting_op
    return device


def test_a_turn_on_a_gpu_is_one_replay(fake_clock):
    turn, captured = harness._turn(fake_clock.op, [(0,), (1,)], "cuda")
    assert captured and turn() == pytest.approx(1e-6)
    assert not fake_clock.strict


def test_what_waits_for_the_device_is_not_captured(fake_clock):
    turn, captured = harness._turn(fake_clock.waiting_op, [(0,)], "cuda:0")
    assert not captured and turn() == pytest.approx(5e-6)
    assert not fake_clock.strict


def test_another_error_is_not_taken_for_waiting(fake_clock):
    def broken(x):
        if fake_clock.strict:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        harness._turn(broken, [(0,)], "cuda")
    assert not fake_clock.strict


def test_a_measurement_on_a_gpu(fake_clock):
    case = harness.Case(
        "op",
        "1 B",
        1,
        lambda: (0,),
        fake_clock.op,
        {"eager": fake_clock.op, "on the host": fake_clock.waiting_op},
        lambda ours, theirs: None,
    )
    timing = harness.measure(case, "cuda", turns=3, bandwidth=1e6)
    assert timing.microseconds == pytest.approx(1.0)
    assert timing.speedup == pytest.approx({"eager": 1.0, "on the host": 5.0})
    assert timing.not_captured == ["on the host"]
    assert "on the host 5.00 (not captured)" in harness.table([timing])
    assert harness._rotation_bytes("cuda") == 200 * 2**20


def test_goals_are_held_against_what_a_gpu_does(fake_clock):
    case = harness.Case("op", "1 B", 1, lambda: (0,), fake_clock.op, {}, lambda a, b: None)
    for goal, met in (
        (harness.Goal(microseconds=2), True),
        (harness.Goal(microseconds=0.5), False),
    ):
        timing = harness.measure(replace(case, goal=goal), "cuda", turns=1, bandwidth=1e6)
        assert timing.goal_met is met
    timing = harness.measure(
        replace(case, goal=harness.Goal(share_of_copy=0.8)), "cuda", turns=1, bandwidth=1e6
    )
    assert timing.share_of_copy == pytest.approx(1.0) and timing.goal_met
    assert "goal >= 80 % of copy: met" in harness.table([timing])


# --- the inputs and checks of the GPU tests -----------------------------------------------------


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "gpu"))
    import variants

    return variants


def test_every_op_has_a_variant(variants):
    assert set(variants.OPS) == set(reference.__all__)
    names = [str(variant) for variant in variants.VARIANTS]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
@pytest.mark.parametrize("length", (1, 40))
def test_variants_hold_on_the_cpu(draw, variants, length):
    """Their checks pass for the CPU's kernels, whatever the contents, and each row stands alone."""
    for variant in variants.VARIANTS:
        arguments = variant.draw(draw, length)
        for contents in (arguments, variants.emptied(arguments), variants.filled(arguments)):
            before = variants.cloned(contents)
            got = variant.run(contents)
            variants.assert_same_bits(variants.flat(contents), variants.flat(before))
            variant.check(contents, got)
            alone = variant.run(variants.row(contents, 1))
            variants.assert_same_bits(alone, [x[1:2] for x in got])


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_checks_notice_a_wrong_result(draw, variants):
    for variant in variants.VARIANTS:
        arguments = variant.draw(draw, 40)
        got = [x.clone() for x in variant.run(arguments)]
        flipped = got[-1] if got[-1].is_floating_point() else got[0]
        flipped.view(-1)[:] = flipped.view(-1) + 1
        with pytest.raises(AssertionError):
            variant.check(arguments, got)


def test_refilled_tensors_are_the_same_tensors(draw, variants):
    variant = next(v for v in variants.VARIANTS if str(v) == "compact_kv-per-head")
    static, fresh = variant.draw(draw, 20), variant.draw(draw, 20)
    places = [x.data_ptr() for x in variants.flat(static)]
    variants.refill(static, fresh)
    variants.assert_same_bits(variants.flat(static), variants.flat(fresh))
    assert [x.data_ptr() for x in variants.flat(static)] == places
