"""Methods that choose among the rows that enter the language model: how they fare in batches, with
videos, and in every way to generate. What they choose is told in tests/methods."""

import sys

import pytest
import torch
from masked_reference import MaskedReference
from test_generation import DETAILS, assert_same
from tiny_llava import ENCODES_FIRST, IMAGE, batch, prompt, tiny_llava
from tiny_models import FAMILIES, VIDEO

import vtp_kernels as vtp

GREEDY = {"max_new_tokens": 3, "do_sample": False} | DETAILS
EACH = (
    vtp.DivPrune(6),
    vtp.DivPrune(0.2, per="image"),
    vtp.CDPruner(0.3),
    vtp.CDPruner(5, per="image"),
    vtp.FrameDifference(0.5, "pictures"),
    vtp.VidCom2(0.3, "pictures"),
)
# Frames that follow upon each other, and a newline behind the last; timestamps between them.
NAMES = ("llava_onevision", "qwen3_vl")


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.mark.parametrize("method", EACH, ids=str)
def test_a_batch_is_its_prompts_one_by_one(llava, method):
    prompts = prompt(3, 9, 0), prompt(1, 4, 1), prompt(0, 6, 2), prompt(2, 3, 3)
    together = batch(*prompts)
    with vtp.prune(llava, method) as run:
        all_of_them = llava.generate(**together, **GREEDY)
        kept, first = run.report().kept, 0
        for b, ids in enumerate(prompts):
            pictures = int((ids == IMAGE).sum()) // 16
            given = {"input_ids": ids[None]}
            if pictures:
                given["pixel_values"] = together["pixel_values"][first : first + pictures]
            first += pictures
            alone = llava.generate(**given, **GREEDY)
            if pictures:
                of_one = run.report().kept.get(0, torch.ones(1, len(ids), dtype=torch.bool))[0]
                assert torch.equal(kept[0][b, -len(ids) :], of_one)
            for now, then in zip(alone.logits, all_of_them.logits, strict=True):
                torch.testing.assert_close(now[0], then[b], rtol=0, atol=2e-5)


# --- videos ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def models(family):
    return {kind: family.model(kind) for kind in ("sdpa", "eager")}


@pytest.mark.parametrize("method", [vtp.FrameDifference(0.4), vtp.VidCom2(0.4)], ids=str)
def test_videos_in_every_way(family, models, method):
    """Greedy decoding is as if rows were masked; all other ways keep the same."""
    model = models["sdpa"]
    drawn = family.draw(model, ((0, (1,), 2), 4), (((1,),), 9), ((), 5))
    inputs = family.inputs(model, *drawn)
    settings = GREEDY | {"suppress_tokens": [IMAGE, VIDEO]}
    with vtp.prune(model, method) as run:
        pruned = model.generate(**inputs, **settings)
        kept, units = run.report().kept, run.report().units
        assert not kept[0].all() and all(unit["kept"][0] for unit in units if "picture" in unit)
        static = model.generate(**inputs, **settings, cache_implementation="static")
        assert_same(static, pruned)
        assert torch.equal(run.report().kept[0], kept[0])
        model.generate(**inputs, **settings | {"do_sample": True}, num_return_sequences=2)
        assert torch.equal(run.report().kept[0], kept[0].repeat_interleave(2, 0))
        if ENCODES_FIRST:
            model.generate(**inputs, **settings, num_beams=2)
            assert torch.equal(run.report().kept[0], kept[0].repeat_interleave(2, 0))
        for b, one in enumerate(drawn[:2]):
            given = family.inputs(model, one)
            alone = model.generate(**given, **settings, prompt_lookup_num_tokens=2)
            assert torch.equal(run.report().kept[0][0], kept[0][b, -len(one[0]) :])
            for now, then in zip(alone.logits, pruned.logits, strict=True):
                torch.testing.assert_close(now[0], then[b], rtol=0, atol=5e-5)
    with MaskedReference(models["eager"], {0: None}, given=kept):
        assert_same(pruned, models["eager"].generate(**inputs, **settings))


def test_a_prompt_that_ends_in_a_video(family, models):
    """Its last row, a cell or an `image_newline`, is asked for and is not among what may leave."""
    ((_, (video,)),) = family.draw(models["sdpa"], (((1,),), 0))
    places = family.placeholders(models["sdpa"], video)
    places = places[: 1 + int((places == VIDEO).nonzero()[-1])]
    inputs = family.inputs(models["sdpa"], (torch.cat((torch.tensor([1, 5]), places)), [video]))
    for method in (vtp.FrameDifference(0.5), vtp.VidCom2(0.5)):
        with vtp.prune(models["sdpa"], method) as run, torch.no_grad():
            models["sdpa"](**inputs, logits_to_keep=1)
        report = run.report()
        prunable = sum(unit["tokens"] for unit in report.units) - 1
        assert report.visual_tokens_per_layer[0] == [int(0.5 * prunable + 0.5)]
        assert report.kept[0][0, -1]


# --- what is refused ------------------------------------------------------------------------------


def test_what_a_family_does_not_tell(llava):
    for method in (vtp.FrameDifference(), vtp.VidCom2()):
        name = type(method).__name__
        with pytest.raises(ValueError, match=rf"{name}\.frames: it is not known of llava which"):
            vtp.apply(llava, method)


@torch.no_grad()
def test_pictures_that_are_no_frames_are_refused_before_a_layer_runs():
    family = FAMILIES["qwen2_5_vl"]
    model = family.model("sdpa")
    ran = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        vtp.prune(model, vtp.FrameDifference(0.5, frames="pictures")),
        pytest.raises(ValueError, match=r"frames, prompt 0: the pictures have \[12, 16\] tokens"),
    ):
        model(**family.batch(model, ((0, 1), 4)))
    hook.remove()
    assert not ran


def test_a_backend_that_has_not_the_op(llava, monkeypatch):
    """Found out when a method is applied, of those that need it."""
    monkeypatch.setattr(sys.modules["vtp_kernels.models.handle"], "ENGINE_OPS", ())
    for method in (vtp.DivPrune(), vtp.CDPruner(), vtp.Chain(vtp.DivPrune(), vtp.FastV())):
        with pytest.raises(NotImplementedError, match="select_diverse: backend 'triton' cannot"):
            vtp.apply(llava, method, backend="triton")
    vtp.apply(llava, vtp.FastV(), backend="triton").remove()
