"""VisionZip, VisPruner, HiPrune, DART and SparseVLM where a prompt is one of several, and has
several pictures, frames or beams."""

import dataclasses

import pytest
import torch
from masked_reference import MaskedReference
from merged_rows import noting_content
from pruning_methods import SELECTORS, pruning_method
from test_every_family import GREEDY
from test_generation import DETAILS, assert_same
from tiny_llava import ENCODES_FIRST
from tiny_models import FAMILIES
from tower_reference import eager_calls

import vtp_kernels as vtp
from reads import Reads
from vtp_kernels.models.towers import Tower
from vtp_kernels.ops import _checks

PROMPTS = (((0,), 9), ((1, 2), 3), ((), 5))
VIDEO = {"llava_onevision": (0, (0,), 2), "qwen2_5_vl": (0, (0,), 2)}


# No CLS, crops and rows that show nothing; windows, and pictures of all sizes.
@pytest.fixture(scope="module", params=VIDEO)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def models(family):
    return {kind: family.model(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(params=SELECTORS)
def method(request, models, tmp_path):
    return pruning_method(request.param, models["sdpa"], tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("per", ["prompt", "picture"])
def test_a_batch_is_its_prompts_one_by_one(family, models, method, per):
    model, method = models["sdpa"], dataclasses.replace(method, per=per)
    drawn = family.draw(model, *PROMPTS)
    inputs = family.inputs(model, *drawn)
    with vtp.prune(model, method) as run:
        together = model(**inputs, logits_to_keep=1).logits
        report = run.report()
        for b, one in enumerate(drawn):
            alone = model(**family.inputs(model, one), logits_to_keep=1).logits
            torch.testing.assert_close(alone[0], together[b], rtol=0, atol=5e-5)
            if not one[1]:
                continue
            for layer, mask in run.report().kept.items():
                assert torch.equal(mask[0], report.kept[layer][b, -mask.shape[1] :])
    if per == "picture":
        check_counts(method, report, report.units)
        return
    counts = [(mask & report.kept.visual).sum(1).tolist() for mask in report.kept.values()]
    kept = [dict(zip(report.kept, prompt, strict=True)) for prompt in zip(*counts, strict=True)]
    tokens = report.kept.visual.sum(1).tolist()
    prompts = [{"tokens": n, "kept": k} for n, k in zip(tokens, kept, strict=True)]
    check_counts(method, report, prompts)


def check_counts(method, report, groups):
    keep = method.keep if isinstance(method.keep, tuple) else (method.keep,)
    for layer, share in zip(sorted(report.kept), keep, strict=True):
        for group in groups:
            assert group["kept"][layer] == int(share * group["tokens"] + 0.5)


def test_videos(family, models, method):
    """Beside pictures; every frame keeps its share."""
    method = dataclasses.replace(method, per="frame")
    inputs = family.batch(models["sdpa"], ((0, (0,), 2), 4), ((1,), 9), ((), 5))
    short = DETAILS | GREEDY | {"max_new_tokens": 2}
    with noting_content() as content, vtp.prune(models["sdpa"], method) as run:
        pruned = models["sdpa"].generate(**inputs, **short)
    report = run.report()
    frames = [unit for unit in report.units if "video" in unit]
    assert len(frames) > 1
    check_counts(method, report, report.units)
    with MaskedReference(
        models["eager"], dict.fromkeys(report.kept), given=report.kept, content=content
    ):
        assert_same(pruned, models["eager"].generate(**inputs, **short))


@pytest.mark.skipif(not ENCODES_FIRST, reason="hands beams the wrong pictures, pruned or not")
def test_beams_keep_what_their_prompt_keeps(family, models, method):
    inputs = family.batch(models["sdpa"], ((0,), 9), ((1,), 3))
    with vtp.prune(models["sdpa"], method) as run:
        models["sdpa"].generate(**inputs, **GREEDY)
        kept = run.report().kept
        models["sdpa"].generate(**inputs, **GREEDY, num_beams=2)
        for layer, mask in run.report().kept.items():
            assert torch.equal(mask, kept[layer].repeat_interleave(2, dim=0))


@torch.no_grad()
def test_by_the_layer_of_the_features():
    """The last but one of CLIP, whose CLS pays."""
    model = FAMILIES["llava"].model("eager")
    inputs = FAMILIES["llava"].batch(model, ((0,), 9))
    attentions = [layer.self_attn for layer in layers_of(model.model.vision_tower)]
    with eager_calls(attentions) as calls, noting_content() as content:
        with vtp.prune(model, vtp.VisionZip(6, 1)) as run:
            model(**inputs)
    ((weights, _),) = calls[attentions[-2]]
    scores = weights[0, :, 0, 1:].mean(0)
    dominant = scores.argsort(descending=True)[:5].tolist()
    target = min(set(range(16)) - set(dominant))
    kept = run.report().kept
    assert kept[0][kept.visual].nonzero()[:, 0].tolist() == sorted([*dominant, target])
    assert list(content) == [0]


def layers_of(tower):
    return getattr(tower, "vision_model", tower).encoder.layers


def test_reports(models, family, method):
    inputs = family.batch(models["sdpa"], *PROMPTS)
    with vtp.prune(models["sdpa"], method) as run, torch.no_grad():
        models["sdpa"](**inputs, logits_to_keep=1)
    report = run.report()
    merged = [event for event in report.events if event["event"] == "merged"]
    assert bool(merged) == (method.name in ("visionzip", "sparsevlm"))
    for event in merged:
        assert event["rows"][2] == event["into"][2] == 0
        assert 0 < event["into"][1] <= event["rows"][1]
    assert report.flops_reduction > 0 and method.name in str(report)
    assert report.to_dict()["method"] == method.to_dict()
    assert vtp.Method.from_dict(report.method) == method


@torch.no_grad()
@pytest.mark.parametrize("per", ["prompt", "picture"])
def test_nobody_waits_for_a_device(models, family, method, per, monkeypatch):
    """As on a GPU, where values are not read to check them."""
    method, reads, decide = dataclasses.replace(method, per=per), Reads(), type(method).decide

    def watched(self, layer, rows):
        with reads:
            return decide(self, layer, rows)

    monkeypatch.setattr(_checks, "may_read", lambda x: False)
    monkeypatch.setattr(_checks, "must_read", lambda x, backend: False)
    monkeypatch.setattr(type(method), "decide", watched)
    with vtp.prune(models["sdpa"], method) as run:
        models["sdpa"](**family.batch(models["sdpa"], *PROMPTS), logits_to_keep=1)
    assert run.report().kept and reads.count == 0


@torch.no_grad()
def test_in_a_chain(models, family):
    """What merges before layer 0, and what compares what is left."""
    method = vtp.Chain(vtp.VisionZip(0.6, 0.4), vtp.DART(3, 0.2, 1, 1))
    inputs = family.batch(models["sdpa"], *PROMPTS)
    with noting_content() as content, vtp.prune(models["sdpa"], method) as run:
        pruned = models["sdpa"](**inputs, logits_to_keep=1).logits
    report = run.report()
    assert [event["event"] for event in report.events].count("merged") == 1
    masked = MaskedReference(
        models["eager"], dict.fromkeys(report.kept), given=report.kept, content=content
    )
    with masked:
        expected = models["eager"](**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(pruned[:, -1:], expected[:, -1:], rtol=0, atol=2e-5)
    both = vtp.Chain(vtp.VisionZip(), vtp.SparseVLM((2,), (0.2,)))
    with pytest.raises(ValueError, match="VisionZip and SparseVLM both decide before layer 0"):
        vtp.apply(models["sdpa"], both)


@torch.no_grad()
def test_what_a_tower_cannot_give(monkeypatch):
    model = FAMILIES["llava"].model("sdpa")
    with pytest.raises(ValueError, match=r"HiPrune\.middle: there is no layer 9, the vision tower"):
        vtp.apply(model, vtp.HiPrune(middle=9))
    monkeypatch.setattr(Tower, "_lines", lambda *_: None)
    with vtp.prune(model, vtp.HiPrune(6, 1.0)):
        with pytest.raises(NotImplementedError, match=r"HiPrune\.decide before layer 0: how the"):
            model(**FAMILIES["llava"].batch(model, ((0,), 9)))
    monkeypatch.setattr(model.model.vision_tower.config, "model_type", "vit")
    with pytest.raises(NotImplementedError, match=r"cannot run VisionZip\("):
        vtp.apply(model, vtp.VisionZip())
