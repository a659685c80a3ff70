"""The benchmark of what the engine costs: its methods keep every row, and its ratios are ratios."""

import torch

import vtp_kernels as vtp
from benchmarks import engine_overhead


def test_methods_keep_what_they_say_and_rows_are_ratios():
    model = engine_overhead.model_of(128, 4, "cpu", torch.float32)
    inputs = engine_overhead.prompt("cpu", torch.float32)
    for name, method in engine_overhead.methods(4).items():
        with vtp.prune(model, method) as run, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        report, most = run.report(), 576
        kept = report.visual_tokens_per_layer
        assert list(report.kept) == [1, 2, 3]
        assert min(kept) == [most] if name == "keep all" else min(kept) == [most - 3]
    rows = engine_overhead.measure("tiny", model, inputs, turns=3, steps=1)
    assert [row.method for row in rows] == ["alone, again", "keep all", "score, keep all"]
    for row in rows:
        low, high = row.prefill_quartiles
        assert -1 < low <= row.prefill_overhead <= high and row.prefill_ms > 0
    assert engine_overhead.table(rows).count("| tiny |") == 3


def test_a_layer_with_nothing_to_do_costs_less_than_a_decision():
    costs = engine_overhead.python_costs(turns=3)
    assert 0 < costs["quiet_layer"] < costs["decision"] < costs["prefill"] and costs["ops"] > 0
