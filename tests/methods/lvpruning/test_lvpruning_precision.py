"""bf16 on a CPU that has no instructions for it is as slow as it was asked for, but not unsaid."""

import dataclasses
import warnings

import pytest
from tiny_training import RECIPE, conversations, tiny_model, tiny_processor

from vtp_kernels.methods.lvpruning import train, training


@pytest.mark.parametrize(
    "precision, fast, warned",
    [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)],
)
def test_warns_where_bf16_is_slow(tmp_path, monkeypatch, precision, fast, warned):
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda device: fast)
    recipe = dataclasses.replace(RECIPE, precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            tiny_model(),
            conversations(4),
            processor=tiny_processor(),
            out=tmp_path,
            recipe=recipe,
            stop_after=1,
        )
    assert any("Recipe.precision: this CPU" in str(x.message) for x in caught) == warned
