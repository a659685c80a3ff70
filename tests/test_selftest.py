"""The self-test passes on what is right, finds what is wrong, and needs nothing but torch."""

import subprocess
import sys

import pytest
import torch

from emulator import serving
from vtp_kernels import _native, cli, ops, selftest
from vtp_kernels.ops._dispatch import BACKENDS, why_not
from vtp_kernels.selection import Selection


def outcomes(draw, op=None, backend=None):
    seed = draw.integer(0, 2**31)
    found = {(outcome.op, outcome.backend): outcome for outcome in selftest.run(seed, ["cpu"])}
    return found if op is None else found[op, backend]


@pytest.fixture
def only(monkeypatch):
    """Restricts the self-test to one op."""
    return lambda op: monkeypatch.setattr(selftest, "TRIALS", {op: selftest.TRIALS[op]})


def test_every_op_and_backend_that_can_serve_agrees(draw):
    found = outcomes(draw)
    assert set(found) == {(op, b) for op in _native.OPS if op[-1] != "_" for b in BACKENDS}
    for (op, backend), outcome in found.items():
        assert outcome.wrong is None, outcome
        assert outcome.missing == why_not(op, backend, "cpu")
        assert (outcome.missing is None) == (outcome.cases > 0)


@pytest.mark.skipif(serving.why_not() is not None, reason=str(serving.why_not()))
@pytest.mark.parametrize("op", ("attention_topk", "select_topk", "compact_kv", "cls_inflection"))
def test_the_cuda_kernels_agree_on_the_emulator(draw, only, monkeypatch, op):
    """What a GPU would be asked, but for float64, which the kernels do not serve."""
    only(op)
    monkeypatch.setattr(selftest, "why_not", lambda op, backend, *rest: why_not_on_a_gpu(*rest))
    with serving.serving():
        outcome = outcomes(draw, op, "native")
    assert outcome.wrong is None and outcome.cases > 0, outcome


def why_not_on_a_gpu(device, dtype=None):
    return "float64" if dtype == torch.float64 else None


def first_row_lost(got):
    selection = got[0] if isinstance(got[0], Selection) else got
    count = int(selection.counts[0])
    selection.indices[0, :count] = torch.roll(selection.indices[0, :count], 1)
    return got


def nudged(got):
    """One number of the last tensor changed by 1e-4 of its size: too far for float32."""
    last = selftest._tensors(got)[-1]
    where = tuple(last.isfinite().nonzero()[-1].tolist())
    last[where] = last[where] * (1 + 1e-4) + 1e-4
    return got


def a_row_swapped(got):
    rows = selftest._tensors(got)[0]
    rows.flatten(0, -2)[:2] = rows.flatten(0, -2)[:2].flip(0).clone()
    return got


def rows_exchanged(got):
    return got.roll(1, 1)


@pytest.mark.parametrize(
    "op, defect, said",
    [
        ("attention_scores", nudged, "scores["),
        ("attention_topk", first_row_lost, "row 0"),
        ("attention_topk", nudged, "scores["),
        ("select_topk", first_row_lost, "row 0"),
        ("inflection", first_row_lost, "row 0"),
        ("cls_inflection", nudged, "similarity["),
        ("cls_inflection", first_row_lost, "row 0"),
        ("token_contribution", nudged, "norm["),
        ("passive_attention", nudged, "output["),
        ("compact_kv", a_row_swapped, "tensor 0"),
        ("compact_rows", a_row_swapped, "tensor 0"),
        ("assign_rows", rows_exchanged, "assignment["),
        ("merge_rows", nudged, "merged["),
    ],
)
def test_a_wrong_result_fails(draw, only, monkeypatch, capsys, op, defect, said):
    right = getattr(ops, op)
    only(op)
    monkeypatch.setattr(ops, op, lambda **arguments: defect(right(**arguments)))
    outcome = outcomes(draw, op, "reference")
    assert outcome.wrong is not None and said in outcome.wrong
    assert cli.main(["selftest", "--seed", "3"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_an_op_that_fails_is_wrong(draw, only, monkeypatch):
    only("select_topk")
    monkeypatch.setattr(ops, "select_topk", lambda **arguments: 1 / 0)
    assert "ZeroDivisionError" in outcomes(draw, "select_topk", "reference").wrong


def test_a_library_that_does_not_load_fails(only, monkeypatch, capsys):
    only("compact_rows")
    monkeypatch.setattr(_native, "missing", "undefined symbol")
    monkeypatch.setattr(selftest.importlib.util, "find_spec", lambda name: object())
    assert selftest.main() == 1
    assert "WRONG: undefined symbol" in capsys.readouterr().out
    monkeypatch.setattr(selftest.importlib.util, "find_spec", lambda name: None)
    assert selftest.main() == 0  # built without


def test_nothing_but_torch_is_needed():
    code = """
import sys
for name in ("numpy", "transformers", "pytest", "triton", "PIL", "safetensors"):
    sys.modules[name] = None
from vtp_kernels.cli import main
sys.exit(main(["selftest"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 do not" in run.stdout
    assert "previously registered" not in run.stderr  # an op that the library registers twice
