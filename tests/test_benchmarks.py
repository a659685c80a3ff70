"""The benchmarks: what is timed is checked first, and the figures are what they say."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks import (
    attention_scores,
    attention_topk,
    chart,
    compare,
    goals,
    harness,
    installed,
    memory,
    shapes,
)
from vtp_kernels.machine import describe


@pytest.mark.parametrize("op", benchmarks.OPS)
def test_op_and_rivals_agree_on_the_first_case(op):
    """The check that runs before the clock does; the shapes of the first case are LLaVA-1.5's."""
    case = importlib.import_module(f"benchmarks.{op}").cases("cpu")[0]
    inputs = case.make()
    assert case.op == op and case.bytes_moved > 0
    with torch.no_grad():
        for rival in case.rivals.values():
            case.check(case.ours(*inputs), rival(*inputs))


def flash_attn_func(q, k, v, causal):
    rows = (x.transpose(1, 2) for x in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        *rows, is_causal=causal, enable_gqa=True
    )
    return attended.transpose(1, 2)


def column_sums(query, key, is_causal):
    """Of the attention of the last M rows, over heads and rows, as flash-colsum's own tests say."""
    assert is_causal and query.shape[1] == key.shape[1]
    rows, length = query.shape[2], key.shape[2]
    hidden = torch.ones(rows, length, dtype=torch.bool).triu(1 + length - rows)
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))


@pytest.fixture
def packages(monkeypatch):
    """A function that puts stand-ins in place of packages, since these want a GPU."""

    def put(**modules):
        for name, functions in modules.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))

    monkeypatch.setattr(installed, "why_not", {})
    return put


def test_packages_that_are_installed_are_rivals(packages):
    """Stand-ins with the calling conventions of the packages."""
    assert not installed.topk("cpu") and not installed.causal_attention("cpu", torch.bfloat16)
    packages(
        flashinfer={"top_k": lambda scores, k: torch.topk(scores, k)},
        flash_attn={"flash_attn_func": flash_attn_func},
        flash_attn_interface={"flash_attn_func": lambda *x, causal: (flash_attn_func(*x, causal),)},
    )
    (topk,) = installed.topk("cuda").values()
    scores = torch.rand(3, 50)
    assert topk(scores, 7).tolist() == scores.topk(7).indices.sort().values.tolist()
    found = installed.causal_attention("cuda", torch.bfloat16)
    assert list(found) == ["flash-attn 3", "flash-attn"]
    q, k, v = torch.randn(2, 4, 9, 8), *torch.randn(2, 2, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for attend in found.values():
        torch.testing.assert_close(attend(q, k, v), expected)
    assert not installed.causal_attention("cuda", torch.float32)  # has 16-bit kernels alone


@pytest.mark.parametrize("version", ("sums", "means"))
def test_flash_colsum_is_a_rival_in_both_its_versions(packages, version):
    """Its first release calls the mean flash_colsum; later the sum, and the mean flash_colmean."""

    def means(query, key, is_causal):
        return column_sums(query, key, is_causal) / (query.shape[1] * query.shape[2])

    newer = {"flash_colsum": column_sums, "flash_colmean": means}
    packages(flash_colsum=newer if version == "sums" else {"flash_colsum": means})
    ((label, rival),) = installed.column_means("cuda", batch=1).items()
    assert label == "flash-colsum"
    assert not installed.column_means("cuda", batch=2) and not installed.column_means("cpu", 1)
    shape = shapes.Shape("tiny", 1, 20, 6, 4, 2, 16, torch.float32)
    case = attention_scores.case(shape, 5, "cpu")
    inputs = case.make()
    case.check(case.ours(*inputs), rival(*inputs))


def test_a_package_that_does_not_import_is_no_rival(monkeypatch, packages):
    def broken(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(installed, "import_module", broken)
    assert not installed.topk("cuda") and not installed.column_means("cuda", 1)
    assert "libcudart.so.12" in installed.why_not["flashinfer"]


def test_a_guest_that_differs_is_left_out_and_the_cell_measured(case):
    guests = {"right": lambda x: x * 2, "wrong": lambda x: x * 3, "broken": lambda x: x.no_such}
    timing = harness.measure(replace(case, guests=guests), "cpu", turns=1, bandwidth=1e9)
    assert list(timing.speedup) == ["sum", "right"] and set(timing.left_out) == {"wrong", "broken"}
    assert timing.left_out["broken"].startswith("AttributeError")
    other = replace(timing, speedup={"sum": 0.5})  # of a shape that the guest does not take
    assert "| sum, right |" in harness.summary([other, timing])


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
    timing = harness.measure(case, "cpu", turns=3, bandwidth=1e9)
    assert timing.microseconds > 0 and timing.share_of_copy > 0
    low, high = timing.spread["sum"]
    assert low <= timing.speedup["sum"] <= high
    assert "| double | 1 MiB |" in harness.table([timing])


def test_rivals_may_check_and_not_be_timed(case):
    timing = harness.measure(case, "cpu", turns=1, bandwidth=1e9, alone=True)
    assert timing.microseconds > 0 and timing.speedup == {}
    with pytest.raises(AssertionError):
        wrong = replace(case, ours=lambda x: x * 3)
        harness.measure(wrong, "cpu", turns=1, bandwidth=1e9, alone=True)


def test_what_torch_compiles_can_be_a_rival(case):
    timing = harness.measure(case, "cpu", turns=1, bandwidth=1e9, compiled=True)
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
        harness.measure(wrong, "cpu", turns=1, bandwidth=1e9)


def choice(scores, *chosen):
    return torch.tensor([chosen]), torch.tensor([scores])


def test_near_ties_may_be_chosen_otherwise_and_nothing_else():
    scores = [0.9, 0.5, 0.5 * (1 + 1e-6), 0.1]
    harness.assert_same_choice(choice(scores, 0, 1), choice(scores, 0, 2))
    for ours, theirs in (((0, 3), (0, 2)), ((1, 2), (0, 2)), ((0,), (0, 2))):
        with pytest.raises(AssertionError):
            harness.assert_same_choice(choice(scores, *ours), choice(scores, *theirs))
    with pytest.raises(AssertionError):  # the right rows of other scores
        harness.assert_same_choice(choice([0.9, 0.5, 0.4, 0.1], 0, 1), choice(scores, 0, 1))


def test_attention_topk_is_held_against_its_own_scores_too():
    case = attention_topk.case(shapes.Shape("tiny", 2, 40, 6, 4, 2, 16, torch.bfloat16), "cpu", 3)
    inputs = case.make()
    indices, scores = case.ours(*inputs)
    (rival,) = case.rivals.values()
    theirs = rival(*inputs)
    case.check((indices, scores), theirs)
    worst = scores[0, :40].argmin()
    with pytest.raises(AssertionError):
        case.check((torch.cat((indices[:, :-1], worst.expand(2, 1)), 1), scores), theirs)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, case):
    """A function that runs the command on cells `a` to `c`, and returns (exit status, file)."""
    cells = [replace(case, shape=name) for name in "abc"]
    monkeypatch.setattr(goals, "cases", lambda device, tiny: cells)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e9)
    path = tmp_path / "bench.json"

    def run(*arguments):
        words = ["benchmarks", "--goals", "--device", "cpu", "--turns", "1", "--json", str(path)]
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        status = benchmarks.main()
        return status, json.loads(path.read_text())

    return SimpleNamespace(run=run, cells=cells, path=path)


def shapes_of(result):
    return [row["shape"] for row in result["rows"]]


def test_a_cell_that_fails_does_not_stop_the_others(command, capsys):
    command.cells[1] = replace(command.cells[1], ours=lambda x: x * 2 + 1)
    status, result = command.run()
    assert status == 1 and shapes_of(result) == ["a", "c"]
    (failed,) = result["failed"]
    assert failed["shape"] == "b" and failed["error"].startswith("AssertionError")
    assert "failed: double, b: AssertionError" in capsys.readouterr().out
    assert result["launch_gap_seconds"] > 0 and result["copy_bytes_per_second"] > 0


def test_what_was_measured_is_in_the_file_before_the_next_cell(command):
    """Whoever is killed in a cell loses that cell, and goes on with the others."""

    class Killed(BaseException):
        pass

    def killed(x):
        (row,) = json.loads(command.path.read_text())["rows"]
        assert row["shape"] == "a"
        raise Killed

    command.cells[1] = replace(command.cells[1], ours=killed)
    with pytest.raises(Killed):
        command.run()
    assert json.loads(command.path.read_text())["running"] == {"op": "double", "shape": "b"}
    command.cells[0] = replace(command.cells[0], ours=lambda x: 1 / 0)  # is not measured again
    status, result = command.run("--resume")
    assert status == 1 and shapes_of(result) == ["a", "c"]
    assert result["failed"][0]["error"] == "the process ended in this cell"


def test_results_of_other_sources_are_not_gone_on_with(command, monkeypatch, capsys):
    command.run()
    monkeypatch.setattr(benchmarks, "identity", lambda: {"sources": "other"})
    _, result = command.run("--resume")
    assert "starting anew" in capsys.readouterr().out and shapes_of(result) == ["a", "b", "c"]


def test_a_lost_device_ends_the_run(command, monkeypatch):
    command.cells[1] = replace(command.cells[1], ours=lambda x: x.no_such)
    monkeypatch.setattr(benchmarks, "why_lost", lambda: "lost")
    status, result = command.run()
    assert status == benchmarks.DEVICE_LOST and shapes_of(result) == ["a"]
    status, result = command.run("--resume")
    assert status == 1 and shapes_of(result) == ["a", "c"]


def test_ops_in_the_order_given():
    args = SimpleNamespace(ops=[], order=["inflection", "select_topk"], device="cpu")
    seen = dict.fromkeys(case.op for case in benchmarks.all_cases(args))
    assert list(seen)[:2] == ["inflection", "select_topk"] and set(seen) == set(benchmarks.OPS)
    args = SimpleNamespace(ops=["compact_kv", "inflection"], order=["inflection"], device="cpu")
    seen = dict.fromkeys(case.op for case in benchmarks.all_cases(args))
    assert list(seen) == ["inflection", "compact_kv"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sort"], "unknown op sort"),
        (["--order", "sort"], "unknown op sort"),
        (["--goals", "inflection"], "--goals: these cells have an order of their own"),
        (["--tiny"], "--tiny: of --goals alone"),
        (["--alone", "--compile"], "--alone: --compile and --plot are about rivals"),
        (["--resume"], "--resume: needs --json"),
    ],
)
def test_arguments_that_do_not_go_together(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main()
    assert message in capsys.readouterr().err


def test_goals_are_of_every_op_and_its_cells_are_told_apart():
    for tiny in (False, True):
        cells = goals.cases("cpu", tiny)
        assert {case.op for case in cells} == set(benchmarks.OPS)
        assert len({(case.op, case.shape) for case in cells}) == len(cells)
    full = goals.cases("cpu")
    assert all(
        "bfloat16" in case.shape or case.op in ("select_topk", "inflection") for case in full
    )
    (compact,) = [case for case in full if case.op == "compact_kv"]
    assert compact.bytes_moved == 2 * 2 * 32 * 32 * 64 * 128 * 2  # read and written, K and V
    assert str(compact.goal) == ">= 85 % of copy"


def test_result_files_name_machine_versions_and_commit():
    named = describe()
    assert named["machine"]["cpu"] and named["machine"]["cores"]
    assert named["versions"]["torch"] == torch.__version__
    assert json.dumps(named)


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
    axes = chart._figure({"op": [0.4, 1.5, 9.0, 300.0]}).axes[0]
    dots = {line.get_marker(): list(line.get_xdata()) for line in axes.lines}
    assert dots["o"] == [1.5, 9.0, 300.0] and dots["x"] == [0.4]
    low, high = axes.get_xlim()
    assert low < 0.4 and high > 300


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
