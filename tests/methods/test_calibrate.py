"""What calibrate() is given: a list of batches, and a method or its string."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_llava import one, three, tiny_llava
from transformers import BatchFeature

import vtp_kernels as vtp


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def test_a_string_stands_for_a_method(model):
    found = vtp.calibrate(model, [one(), three()], "pyramiddrop:2=0.5,4=0.25")
    assert found.keep == {2: 0.5, 4: 0.25}
    inputs = one()
    logits = []
    for method in ("fastv:2:0.5", vtp.FastV(2, 0.5)):
        with torch.no_grad(), vtp.prune(model, method) as run:
            logits.append(model(**inputs).logits)
        assert run.report().method == vtp.FastV(2, 0.5).to_dict()
    assert torch.equal(*logits)


def test_batches_that_come_one_by_one(model):
    batches = (BatchFeature(make()) for make in (one, three))
    assert vtp.calibrate(model, batches, "fastv:2:0.5").keep == {2: 0.5}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (BatchFeature(one()), r"got one batch \(a BatchFeature\): pass \[batch\]$"),
        (one(), r"got one batch \(a dict\): pass \[batch\]$"),
        (one()["input_ids"], r"expected a list of batches, got a tensor \[1, \d+\] of int64$"),
        (3, "expected a list of batches, got 3$"),
        ("batch", "expected a list of batches, got 'batch'$"),
        (vtp.FastV(2), "expected a list of batches, got a FastV$"),
        ([one(), one()["input_ids"]], r"batches\[1\]: expected a mapping .*, got a tensor \[1, "),
        ([(one(), 1)], r"batches\[0\]: expected a mapping of the model's inputs, .*, got a tuple$"),
    ],
)
def test_what_are_no_batches(model, batches, message):
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(TypeError, match=message):
            vtp.calibrate(model, batches, vtp.FastV(2))
    finally:
        hook.remove()


def test_a_batch_that_is_none_among_those_to_come(model):
    with pytest.raises(TypeError, match=r"batches\[1\]: .* got None$"):
        vtp.calibrate(model, iter([one(), None]), vtp.FastV(2))


def test_no_schedule_merges_rows(model):
    method = vtp.SparseVLM((2,), (0.25,))
    with pytest.raises(ValueError, match="SparseVLM decides before layer 0, and a schedule that"):
        vtp.calibrate(model, [one()], method)
    with pytest.raises(ValueError, match="SparseVLM merges rows that leave into others, which no"):
        vtp.calibrate(model, [one()], method, score="random")
    found = vtp.calibrate(model, [three()], vtp.DART(2, 0.25))
    assert found.keep == {2: 0.25}
