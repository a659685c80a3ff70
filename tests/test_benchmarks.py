"""The benchmarks: what is timed is checked first, and the figures are what they say."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageColor

from benchmarks import __main__ as benchmarks
from benchmarks import chart, compare, gpu_check, harness, installed, memory, shapes
from vtp_kernels.machine import describe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", benchmarks.OPS)
def test_op_and_rivals_agree_on_the_first_case(op):
    """The check that runs before the clock does; the shapes of the first case are LLaVA-1.5's."""
    case = importlib.import_module(f"benchmarks.{op}").cases("cpu")[0]
    inputs = case.make()
    assert case.op == op and case.bytes_moved > 0
    with torch.no_grad():
        for rival in case.rivals.values():
            case.check(case.ours(*inputs), rival(*inputs))


def test_packages_that_are_installed_are_rivals(monkeypatch):
    """Stand-ins with the calling conventions of the packages, since these want a GPU."""

    def flash_attn_func(q, k, v, causal):
        rows = (x.transpose(1, 2) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *rows, is_causal=causal, enable_gqa=True
        )
        return attended.transpose(1, 2)

    assert not installed.topk("cpu") and not installed.causal_attention("cpu", torch.bfloat16)
    for name, functions in {
        "flashinfer": {"top_k": lambda scores, k: torch.topk(scores, k)},
        "flash_attn": {"flash_attn_func": flash_attn_func},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__="here", **functions))
    (topk,) = installed.topk("cuda").values()
    scores = torch.rand(3, 50)
    assert topk(scores, 7).tolist() == scores.topk(7).indices.sort().values.tolist()
    (attend,) = installed.causal_attention("cuda", torch.bfloat16).values()
    q, k, v = torch.randn(2, 4, 9, 8), *torch.randn(2, 2, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attend(q, k, v), expected)
    assert not installed.causal_attention("cuda", torch.float32)  # has 16-bit kernels alone


@pytest.fixture
def case():
    return harness.Case(
        "double",
        "1 MiB",
        2**21,
        lambda: (torch.randn(2**18),),
        lambda x: x * 2,
        {"sum": lambda x: x + x},
        harness.assert_equal,
    )


def test_a_timing_has_time_bandwidth_and_ratios(case):
    (timing,) = harness.measure([case], "cpu", turns=3)
    assert timing.microseconds > 0 and timing.share_of_copy > 0
    low, high = timing.spread["sum"]
    assert low <= timing.speedup["sum"] <= high
    assert "| double | 1 MiB |" in harness.table([timing])


def test_what_torch_compiles_can_be_a_rival(case):
    (timing,) = harness.measure([case], "cpu", turns=1, compiled=True)
    assert list(timing.speedup) == ["sum", "torch.compile"]


def test_the_summary_sets_torch_compile_apart():
    plain = [timing(2.0), timing(8.0, shape="16")]
    assert (
        harness.summary(plain).splitlines()[2]
        == "| `double` | 2 | 4.0 | 2.00 to 8.0 | torch eager |"
    )
    with_it = [replace(x, speedup=x.speedup | {"torch.compile": 0.5}) for x in plain]
    line = "| `double` | 2 | 4.0 | 2.00 to 8.0 | torch eager | 0.5 | 0.50 to 0.5 |"
    assert harness.summary(with_it).splitlines()[2] == line


def test_shapes_cover_batches_models_and_grouped_queries():
    on_gpu, on_cpu = shapes.shapes("cuda"), shapes.shapes("cpu")
    assert set(on_cpu) < set(on_gpu)
    for found in (on_cpu, on_gpu):
        assert {x.name for x in found} == {name for name, *_ in shapes.MODELS}
        assert {x.batch for x in found} == {1, 8, 32}
        assert {x.heads // x.kv_heads for x in found} == {1, 4, 7}


def test_a_wrong_result_is_never_timed(case):
    wrong = replace(case, ours=lambda x: x * 2 + 1)
    with pytest.raises(AssertionError):
        harness.measure([wrong], "cpu", turns=1)


def test_result_files_name_machine_versions_and_commit():
    named = describe()
    assert named["machine"]["cpu"] and named["machine"]["cores"]
    assert named["versions"]["torch"] == torch.__version__
    assert json.dumps(named)


def test_unknown_op_is_named():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "sort"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "unknown op sort" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: gpu-check would run")
def test_gpu_check_without_a_gpu_claims_nothing(capsys):
    assert gpu_check.main() == 2
    assert "nothing was checked" in capsys.readouterr().err


def timing(ratio: float, best: float | None = None, shape: str = "8") -> harness.Timing:
    spread = {"torch eager": (0.9 * ratio, best or 1.1 * ratio)}
    return harness.Timing("double", shape, 1.0, 1.0, 1.0, {"torch eager": ratio}, spread)


@pytest.mark.parametrize(
    "old, new, slower, line",
    [
        (timing(4.0), timing(3.0), True, "slower: double, 8: 4.00 -> 3.00 times torch eager"),
        (timing(4.0), timing(3.0, best=4.5), False, None),  # a noisy run tells nothing
        (timing(4.0), timing(3.7), False, None),
        (timing(4.0), timing(5.0), False, "faster: double, 8: 4.00 -> 5.00 times torch eager"),
    ],
)
def test_an_op_that_got_slower_is_named(old, new, slower, line):
    key = ("double", "8")
    lines, worse = compare.compare({key: old}, {key: new}, tolerance=0.15)
    assert (lines, worse) == ([line] if line else [], slower)


def test_only_rivals_of_both_runs_are_compared():
    key = ("double", "8")
    old = replace(timing(4.0), speedup={"torch eager": 4.0, "torch.compile": 1.5})
    assert compare.compare({key: old}, {key: timing(4.0)}, tolerance=0.15) == ([], False)
    old = replace(timing(4.0), speedup={"torch.compile": 1.5})
    lines, worse = compare.compare({key: old}, {key: timing(4.0)}, tolerance=0.15)
    assert lines == ["no rival in common: double, 8"] and not worse


def test_the_chart_has_a_dot_for_every_shape(tmp_path):
    rows = [timing(ratio, shape=str(ratio)) for ratio in (0.4, 1.5, 9.0, 300.0)]
    picture = chart.draw(rows, tmp_path / "made" / "it.png")
    assert Image.open(tmp_path / "made" / "it.png").size == picture.size
    colors = dict((color, count) for count, color in picture.getcolors(100_000))
    blue, red = (colors[ImageColor.getrgb(color)] for color in (chart.FASTER, chart.SLOWER))
    assert blue == 3 * red  # the mean's line crosses none of them


def test_cells_that_come_and_go_are_named():
    lines, worse = compare.compare({("a", "1"): timing(2)}, {("b", "2"): timing(2)}, 0.15)
    assert lines == ["new: b, 2", "not measured: a, 1"] and not worse


def test_the_baseline_is_of_the_same_kind_of_machine(monkeypatch, tmp_path, capsys):
    machine = {"cpu": "Abacus", "cores": 2, "gpu": None, "threads": 2}
    result = tmp_path / "abacus" / "bench.json"
    result.parent.mkdir()
    result.write_text(json.dumps({"rows": [asdict(timing(2.0))], "machine": machine}))
    assert compare.baseline(machine | {"threads": 1}, tmp_path) == result
    assert compare.baseline(machine | {"cores": 4}, tmp_path) is None
    monkeypatch.setattr(sys, "argv", ["compare", str(result)])
    assert compare.main() == 2
    assert "no result file for cpu Abacus, cores 2, gpu None" in capsys.readouterr().err
    monkeypatch.setattr(compare, "baseline", lambda machine: result)
    assert compare.main() == 0 and "no change" in capsys.readouterr().out


def test_peak_memory_is_that_of_the_work():
    def work():
        held = [torch.ones(2**18) for _ in range(40)]  # a MiB each, which malloc keeps
        return sum(x[0] for x in held)

    work()  # threads and caches are there
    found = [memory.peak_bytes(torch.device("cpu"), work) / 2**20 for _ in range(3)]
    assert all(39 <= x <= 46 for x in found), found
    assert memory.peak_bytes(torch.device("cpu"), lambda: None) < 2**20


def test_peak_memory_is_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "HIGH_WATER", tmp_path / "no such file")
    assert memory.peak_bytes(torch.device("cpu"), lambda: 1 / 0) is None
