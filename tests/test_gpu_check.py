"""gpu-check and the GPU tests, as far as they go without a GPU: commands, counts, files, fakes."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, harness
from vtp_kernels import _native, reference

DESCRIBED = {"machine": {"gpu": "NVIDIA H200"}, "versions": {"torch": "2.11"}, "commit": "abc"}
PASSED = "185 passed, 2 skipped, 9 deselected in 4.93s\n"


# --- what a command's output says ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, counts",
    [
        (PASSED, (185, 0, 2, 0)),
        ("noise\n2 failed, 3 passed, 7 warnings, 1 error in 65.12s (0:01:05)\n", (3, 2, 0, 1)),
        ("==== 1 passed, 2 errors in 0.10s ====\nlater output\n", (1, 0, 0, 2)),
        ("no tests ran in 0.01s\n", (0, 0, 0, 0)),
        ("Segmentation fault\n", (None, None, None, None)),
    ],
)
def test_counts_tests(text, counts):
    names = ("passed", "failed", "skipped", "errors")
    assert gpu_check.count_tests(text) == dict(zip(names, counts, strict=True))


HEAD = "========= COMPUTE-SANITIZER\n"
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


@pytest.mark.parametrize(
    "tool, text, reports",
    [
        ("memcheck", PASSED + "========= ERROR SUMMARY: 0 errors\n", {"reports": 0}),
        ("synccheck", PASSED + "========= ERROR SUMMARY: 1 error\n", {"reports": 1}),
        (
            "memcheck",
            PASSED
            + "========= ERROR SUMMARY: 1200 errors\n"
            + "========= ERROR SUMMARY: 200 errors were not printed. Use --print-limit option\n",
            {"reports": 1200},
        ),
        ("memcheck", PASSED, {"reports": None}),
        (
            "racecheck",
            PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            {"reports": 0, "warnings": 0},
        ),
        (
            "racecheck",
            PASSED + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 2 warnings)\n",
            {"reports": 1, "warnings": 2},
        ),
        ("racecheck", PASSED + "========= ERROR SUMMARY: 0 errors\n", {"reports": None}),
        (
            "initcheck",
            TORCH + OURS + TORCH + PASSED + "========= ERROR SUMMARY: 3 errors\n",
            {"reports": 1, "others": 2, "unseen": 0},
        ),
        (
            "initcheck",
            TORCH + PASSED + "========= ERROR SUMMARY: 1001 errors\n",
            {"reports": 0, "others": 1, "unseen": 1},
        ),
    ],
)
def test_counts_reports(tool, text, reports):
    counts = gpu_check.count_reports(tool, HEAD + text)
    assert counts["passed"] == 185
    assert {name: counts[name] for name in reports} == reports
    clean = all(number == 0 for name, number in reports.items() if name != "others")
    assert bool(gpu_check.failures(counts)) != clean


def test_a_device_that_the_sanitizer_cannot_serve_is_a_failure():
    text = HEAD + "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n"
    assert "passed" in gpu_check.failures(gpu_check.count_reports("memcheck", text))


def test_nothing_passed_is_a_failure():
    assert gpu_check.failures(gpu_check.count_tests("7 skipped in 0.5s")) == ["passed"]
    assert gpu_check.failures({}) == []


# --- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", gpu_check.TOOLS)
def test_sanitizer_commands(tool):
    command = gpu_check.sanitized("compute-sanitizer", tool)
    options, program = command[: command.index(sys.executable)], command[-1]
    assert options[:3] == ["compute-sanitizer", "--tool", tool]
    assert (Path(gpu_check.__file__).parents[1] / program).exists()
    assert ("kns=_ZN3vtp4cuda" in options) == (tool != "initcheck")
    assert ("--padding" in options) == (tool == "memcheck")


def test_the_sanitizer_is_found_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.sanitizer() is None
    result = gpu_check.run_part("racecheck", tmp_path, 1.0)
    assert not result["ok"] and "compute-sanitizer not found" in result["last_line"]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert gpu_check.sanitizer() == str(tool)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_runs_a_command_with_its_environment(capsys):
    code = "import os, sys; print(os.environ['EXTRA']); print('1 passed in 0.10s', file=sys.stderr)"
    result = gpu_check.run("tests", python(code), 60.0, gpu_check.count_tests, {"EXTRA": "yes"})
    assert result["ok"] and result["last_line"] == "1 passed in 0.10s"
    assert result["counts"]["passed"] == 1 and result["seconds"] >= 0
    assert result["command"][0] == "EXTRA=yes"
    assert "yes\n" in capsys.readouterr().out


def test_a_command_that_fails(capsys):
    result = gpu_check.run("tests", python("exit(3)"), 60.0, lambda text: {})
    assert not result["ok"] and result["last_line"] == "no output"


def test_a_command_that_takes_too_long(capsys):
    code = "import time; print('working', flush=True); time.sleep(60)"
    result = gpu_check.run("tests", python(code), 3.0, lambda text: {})
    assert not result["ok"] and result["last_line"] == "stopped after 3 s"
    assert result["seconds"] < 30
    assert "working" in capsys.readouterr().out


# --- main and its file --------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine with a GPU, as far as gpu_check asks, on which every part succeeds."""
    ran = []

    def run(name, command, timeout, count, environment=None):
        ran.append(name)
        return {"ok": name not in fake.fail, "last_line": f"{name} done", "command": command}

    fake = SimpleNamespace(ran=ran, fail=set(), commit="abc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (80 GB)")
    monkeypatch.setattr(gpu_check, "why_not", lambda op, backend, device: None)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    monkeypatch.setattr(gpu_check, "library", lambda: "digest")
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "describe", lambda: {**DESCRIBED, "commit": fake.commit})
    return fake


def checked(folder):
    return json.loads((folder / "nvidia-h200-80-gb" / "check.json").read_text())


def test_all_parts(fake_gpu, tmp_path, capsys):
    assert gpu_check.main(["--results", str(tmp_path)]) == 0
    assert tuple(fake_gpu.ran) == gpu_check.PARTS
    result = checked(tmp_path)
    assert result["ok"] and result["missing"] == [] and tuple(result["parts"]) == gpu_check.PARTS
    assert result["machine"]["gpu"] == "NVIDIA H200" and result["commit"] == "abc"
    assert capsys.readouterr().out.count(" ok ") == len(gpu_check.PARTS)


def test_parts_one_by_one(fake_gpu, tmp_path, capsys):
    for part in reversed(gpu_check.PARTS):
        assert gpu_check.main(["--part", part, "--results", str(tmp_path)]) == 0
        result = checked(tmp_path)
        assert result["ok"] == (part == "tests") and part not in result["missing"]
    assert tuple(result["parts"]) == gpu_check.PARTS
    assert "not run" in capsys.readouterr().out


def test_results_of_another_commit_are_dropped(fake_gpu, tmp_path, capsys):
    gpu_check.main(["--part", "tests", "--part", "memcheck", "--results", str(tmp_path)])
    fake_gpu.commit = "def"
    gpu_check.main(["--part", "racecheck", "--results", str(tmp_path)])
    assert list(checked(tmp_path)["parts"]) == ["racecheck"]


def test_a_part_that_fails(fake_gpu, tmp_path, capsys):
    fake_gpu.fail = {"racecheck"}
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    assert tuple(fake_gpu.ran) == gpu_check.PARTS  # the others ran all the same
    assert not checked(tmp_path)["ok"]
    assert "racecheck   FAILED   racecheck done" in capsys.readouterr().out
    assert gpu_check.main(["--part", "tests", "--results", str(tmp_path)]) == 0


def test_a_library_without_cuda_code_is_named(fake_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "why_not", lambda op, backend, device: "no CUDA code")
    assert gpu_check.main(["--results", str(tmp_path)]) == 1
    assert "no CUDA code; nothing was checked" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--part", "leakcheck"])
    assert stopped.value.code == 2 and "invalid choice: 'leakcheck'" in capsys.readouterr().err


@pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing))
def test_the_library_has_a_digest():
    assert len(gpu_check.library()) == 16 and gpu_check.library() == gpu_check.library()


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
    (timing,) = harness.measure([case], "cuda", turns=3, bandwidth=1e6)
    assert timing.microseconds == pytest.approx(1.0)
    assert timing.speedup == pytest.approx({"eager": 1.0, "on the host": 5.0})
    assert timing.not_captured == ["on the host"]
    assert "on the host 5.00 (not captured)" in harness.table([timing])
    assert harness._rotation_bytes("cuda") == 200 * 2**20


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
