"""Deciders in every family: masking, as in training, comes to the same as removing."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

from tiny_models import FAMILIES, windows

import vtp_kernels as vtp
from vtp_kernels.methods.lvpruning.deciders import Deciders
from vtp_kernels.methods.lvpruning.files import Fit, save_deciders
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.masked_run import MaskedRun

LAYERS, RATIOS = (1, 4), (0.5, 0.25)  # among the deepstack layers of Qwen3-VL, and behind


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_is_removing(family, tmp_path):
    tiny = FAMILIES[family]
    model = tiny.model("sdpa")
    parts = parts_of(model)
    if tiny.page.sees_ahead or any(windows(model)):
        with pytest.raises(NotImplementedError, match=f"{family} cannot train"):
            MaskedRun(parts, LAYERS, lambda layer, hidden: None)
        return
    fit = Fit.of(parts.family, parts.text.config, LAYERS, 16)
    torch.manual_seed(1)
    save_deciders(tmp_path, Deciders(fit.shape), fit, {})
    inputs = tiny.batch(model, ((0,), 6), ((1, 2), 4), ((), 5))
    method = vtp.LVPruning(tmp_path, LAYERS, RATIOS)
    with torch.no_grad(), vtp.prune(model, method) as run:
        pruned = model(**inputs, logits_to_keep=1).logits[:, -1]
    kept = run.report().kept
    visual = parts.visual_tokens(inputs)

    def decide(layer, hidden):
        return torch.where(visual, kept[layer].float(), 1.0)

    with torch.no_grad(), MaskedRun(parts, LAYERS, decide) as masked:
        masked.valid = inputs["attention_mask"].bool()
        reference = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(pruned, reference, rtol=1e-4, atol=1e-4)
    for layer, ratio in zip(LAYERS, RATIOS, strict=True):
        counts = [int(ratio * n) for n in visual.sum(1).tolist()]
        assert (kept[layer] & visual).sum(1).tolist() == counts
