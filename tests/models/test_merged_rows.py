"""Rows that stay and take in others: as where nothing leaves, and the same rows are put in."""

import pytest
import torch
from masked_reference import MaskedReference
from merged_rows import MergeAll, noting_content
from test_every_family import GREEDY, PROMPTS
from test_generation import DETAILS, assert_same
from tiny_models import FAMILIES

import vtp_kernels as vtp


def merging(visual, before, now):
    """Told again, prompt by prompt: the first visual row that stays is the mean of those that
    leave."""

    def merge(hidden):
        hidden = hidden.clone()
        for b, rows in enumerate(visual):
            if rows.any():
                left = rows & before[b] & ~now[b]
                first = int((rows & now[b]).nonzero()[0])
                hidden[b, first] = hidden[b, left].mean(0)
        return hidden

    return merge


# One of each kind: plain; features that are added between layers; rows that see what is behind
# them; positions in rows and columns.
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_merged_rows(name, positions):
    if name not in FAMILIES:
        pytest.skip("not in this transformers")
    family = FAMILIES[name]
    sdpa, eager = family.model("sdpa"), family.model("eager")
    if positions not in family.page.positions:
        return
    inputs = family.batch(sdpa, *PROMPTS)
    with noting_content() as noted, vtp.prune(sdpa, MergeAll((0, 3)), positions=positions) as run:
        pruned = sdpa.generate(**inputs, **GREEDY, **DETAILS)
    kept = run.report().kept
    visual = kept.visual
    before = {0: torch.ones_like(visual), 3: kept[0]}
    content = {layer: merging(visual, before[layer], kept[layer]) for layer in (0, 3)}
    assert noted.keys() == content.keys() and 0 < kept[3].sum() < kept[0].sum()
    options = {"given": kept, "contiguous": positions == "contiguous"}
    with MaskedReference(eager, dict.fromkeys(kept), content=content, **options):
        assert_same(pruned, eager.generate(**inputs, **GREEDY, **DETAILS))
    with MaskedReference(eager, dict.fromkeys(kept), **options):
        unmerged = eager.generate(**inputs, **GREEDY, **DETAILS)
    assert not torch.allclose(unmerged.logits[0], pruned.logits[0], atol=1e-3)
