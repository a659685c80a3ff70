"""The end-to-end benchmark: what it times is right, and its figures are what they say."""

import sys

import pytest
import torch
from tiny_llava import one, tiny_llava
from tiny_models import FAMILIES

import vtp_kernels as vtp
from benchmarks import end_to_end
from benchmarks.published import published_fastv


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_published_code_keeps_what_fastv_keeps(keep):
    model, inputs = tiny_llava(), one()
    dense = model(**inputs).logits
    with published_fastv(model, 2, keep):
        theirs = model(**inputs, logits_to_keep=1).logits
    with vtp.prune(model, vtp.FastV(2, keep)):
        ours = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(model(**inputs).logits, dense)  # and nothing is left behind
    assert not torch.allclose(dense[:, -1:], theirs, atol=1e-5)


METHODS = {"FastV": vtp.FastV(2, 0.5), "random": vtp.RandomPruning(0, 0.25)}


@pytest.mark.parametrize("make", [tiny_llava, FAMILIES["llava_next"].make])
def test_rows_of_a_model_with_random_weights(make):
    model = make().eval()
    inputs = end_to_end.random_prompts(model, 2, before=3, after=4)
    rows = end_to_end.measure("tiny", model, inputs, METHODS, repeats=2, steps=2)
    assert [x.method for x in rows] == ["dense", "FastV", "random"]  # published: one prompt only
    dense, fastv, random = rows
    assert dense.speedup == dense.ideal_speedup == 1 and dense.pruning_ms == 0
    assert random.ideal_speedup > fastv.ideal_speedup > 1
    assert random.kv_bytes < fastv.kv_bytes < dense.kv_bytes
    for x in rows:
        assert x.spread[0] <= x.speedup <= x.spread[1]
        assert x.first_token_ms > x.pruning_ms >= 0 and x.decode_tokens_per_second > 0
    assert end_to_end.table(rows).count("| tiny | 2 |") == 3


def test_every_row_has_the_peak_of_its_own_run(monkeypatch):
    peaks = iter((30, 10, 20))

    def peak_bytes(device, work):
        work()
        return next(peaks)

    monkeypatch.setattr(end_to_end, "peak_bytes", peak_bytes)
    model = tiny_llava()
    inputs = end_to_end.random_prompts(model, 2, before=3, after=4)
    rows = end_to_end.measure("tiny", model, inputs, METHODS, repeats=1, steps=1)
    assert [x.peak_bytes for x in rows] == [30, 10, 20]


def test_published_code_stands_in_the_table_of_one_prompt():
    model = tiny_llava()
    inputs = end_to_end.random_prompts(model, 1, before=3, after=4)
    rows = end_to_end.measure("tiny", model, inputs, METHODS, repeats=1, steps=1)
    assert rows[-1].method == end_to_end.PUBLISHED
    assert rows[-1].kv_bytes is None and rows[-1].decode_tokens_per_second is None


def test_methods_fit_their_models():
    for method in end_to_end.PAPERS.values():
        method.check_model(32)
    for method in end_to_end.pocket_methods().values():
        method.check_model(8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "llava-1.5-7b"], "--random-weights: pocket is trained"),
        (["--random-weights"], "--random-weights: pocket is trained"),
        (["--batch", "0"], "expected at least 1"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main()
    assert message in capsys.readouterr().err


def test_the_small_trained_model(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    sizes = ["--batch", "1", "--repeats", "1", "--decode-steps", "1"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *sizes, "--json", str(path)])
    end_to_end.main()
    assert "| pocket | 1 | VisiPruner |" in capsys.readouterr().out
    assert path.exists()
