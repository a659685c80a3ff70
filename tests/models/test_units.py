"""Pictures and frames as units: budgets of their own, and what methods and reports see of them."""

import json
from dataclasses import dataclass

import pytest
import torch
from masked_reference import MaskedReference
from test_generation import DETAILS, assert_same
from tiny_llava import ENCODES_FIRST, IMAGE
from tiny_models import FAMILIES, VIDEO

import vtp_kernels as vtp
from vtp_kernels.methods.scorers import SCORERS

GREEDY = {"max_new_tokens": 2, "do_sample": False}
# Two pictures and a video; a video; a picture; text. Families: frames that follow upon each other,
# and a newline behind the last; two frames to a grid; timestamps between them.
PROMPTS = ((0, (1,), 2), 4), (((1,),), 9), ((1,), 2), ((), 5)
NAMES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")
FRAME = {"llava_onevision": 4, "qwen2_5_vl": 4, "qwen3_vl": 4}  # tokens


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models(name):
    return {kind: FAMILIES[name].model(kind) for kind in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def inputs(name, models):
    return FAMILIES[name].batch(models["sdpa"], *PROMPTS)


def groups_of(ids, name, per):
    """Told again from the tokens, one by one: int64 [B, S]."""
    groups = torch.full_like(ids, -1)
    for b, row in enumerate(ids.tolist()):
        number, of_video = -1, 0
        for column, token in enumerate(row):
            if token not in (IMAGE, VIDEO):
                continue
            ends = column + 1 == len(row) or row[column + 1] != token
            if token == IMAGE or not of_video:
                starts = column == 0 or row[column - 1] != token
                number += starts or token == VIDEO
            elif per == "frame" and of_video % FRAME[name] == 0:
                newline = name == "llava_onevision" and ends
                number += not newline
            groups[b, column] = number
            # Prompts have one video each.
            of_video = 0 if token == IMAGE else of_video + 1
    return groups


@pytest.mark.parametrize("per", ["picture", "frame"])
@pytest.mark.parametrize("score", ["last_token", "contribution"])
def test_every_unit_has_a_budget_of_its_own(name, models, inputs, per, score):
    """A share, halves rounded up, then a number, which some do not have."""
    stages = {2: 0.4, 3: 0.375, 5: 1}
    groups = groups_of(inputs["input_ids"], name, per)
    with vtp.prune(models["sdpa"], vtp.Schedule(stages, score=score, per=per)) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(models["eager"], stages, score=score, groups=groups) as masked:
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    report = run.report()
    for layer in stages:
        assert torch.equal(report.kept[layer], masked.kept[layer]), f"layer {layer}"
    assert_same(pruned, reference)
    if per == "frame":
        assert all(unit["kept"][5] == 1 for unit in report.units)
        assert len(report.units) == int(groups.max(1).values.add(1).sum())


@dataclass(frozen=True)
class Ranks(vtp.Method):
    """Lets nothing leave, and tells the scores of chance."""

    def decision_layers(self, depth):
        return (0,)

    def decide(self, layer, rows):
        rows.memory["scores"] = SCORERS["random"].score(rows, 0)

    def events(self, memory):
        return [{"layer": 0, "event": "scores", "scores": memory["scores"]}]


@torch.no_grad()
def test_chance_chooses_within_each_frame(name, models, inputs):
    """Before layer 0, by the same scores as in the whole prompt."""
    model, groups = models["sdpa"], groups_of(inputs["input_ids"], name, "frame")
    with vtp.prune(model, Ranks()) as run:
        model(**inputs)
    scores = run.report().events[0]["scores"]
    with vtp.prune(model, vtp.RandomPruning(0, 0.5, per="frame")) as run:
        model(**inputs)
    for b, row in enumerate(groups):
        for group in range(int(row.max()) + 1):
            columns = (row == group).nonzero()[:, 0].tolist()
            best = sorted(columns, key=lambda c: (-float(scores[b, c]), c))
            kept = [c for c in columns if run.report().kept[0][b, c]]
            assert kept == sorted(best[: (len(columns) + 1) // 2])


@dataclass(frozen=True)
class FirstFrame(vtp.Method):
    """Keeps the first unit of each prompt."""

    def decision_layers(self, depth):
        return (1, 3)

    def needs_units(self):
        return True

    def decide(self, layer, rows):
        seen = rows.memory.setdefault("seen", {})
        seen[layer] = rows.unit.clone(), rows.units, rows.unit_counts, rows.origin, rows.visual
        return rows.keep_where(rows.unit == 0, [(c or [0])[0] for c in rows.unit_counts])

    def events(self, memory):
        return [{"layer": layer, "event": "seen", "seen": x} for layer, x in memory["seen"].items()]


@torch.no_grad()
def test_methods_see_the_unit_of_each_row(name, models, inputs):
    groups = groups_of(inputs["input_ids"], name, "frame")
    with vtp.prune(models["sdpa"], FirstFrame()) as run:
        models["sdpa"](**inputs)
    for event in run.report().events:
        if event["event"] != "seen":
            continue
        unit, units, counts, origin, visual = event["seen"]
        assert torch.equal(unit[visual], groups.gather(1, origin)[visual])
        assert (unit[~visual] == -1).all()
        for b, of_prompt in enumerate(units):
            assert counts[b] == [int((groups[b] == n).sum()) for n in range(len(of_prompt))]
            for number, found in enumerate(of_prompt):
                assert (groups[b, found.columns] == number).all() and found.prompt == b
                assert (found.frames is None) == (found.video is None) != (found.picture is None)
    report = run.report()
    assert [u["kept"][3] > 0 for u in report.units if u["prompt"] == 1][:2] == [True, False]


def test_the_last_row_of_a_picture_has_no_budget(models):
    """It is asked for, and stays."""
    family = FAMILIES["qwen2_5_vl"]
    model = family.model("sdpa")
    (_, (picture, other)) = family.draw(model, ((0, 2), 0))[0]
    places = [family.placeholders(model, x) for x in (picture, other)]
    ids = torch.cat((torch.tensor([1]), places[0], torch.tensor([5]), places[1]))
    inputs = family.inputs(model, (ids, [picture, other]))
    with vtp.prune(model, vtp.FastV(2, 0.5, per="picture")) as run, torch.no_grad():
        model(**inputs)
    assert [unit["tokens"] for unit in run.report().units] == [16, 6]
    assert [unit["kept"][2] for unit in run.report().units] == [8, 3 + 1]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"], scope="module")
def test_64_frames(models, name):
    family, method = FAMILIES[name], vtp.PyramidDrop((1, 3), (0.5, 1), per="frame")
    inputs = family.batch(models["sdpa"], (((2,),), 4), ((), 3))
    groups = groups_of(inputs["input_ids"], name, "frame")
    with vtp.prune(models["sdpa"], method) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    with MaskedReference(models["eager"], {1: 0.5, 3: 1}, groups=groups) as masked:
        reference = models["eager"].generate(**inputs, **GREEDY, **DETAILS)
    report = run.report()
    assert torch.equal(report.kept[3], masked.kept[3]) and len(report.units) == 64
    assert_same(pruned, reference)
    grids = "" if name == "llava_onevision" else " in 64 grids"
    frames = 128 if grids else 64
    assert f"video 1: {frames} frames{grids}; kept from layer 3, first to last: 1 each" in str(
        report
    )
    text = inputs["attention_mask"].bool() & ~report.kept.visual
    assert (report.kept[3] & text == text).all()  # and the timestamps
    plain = json.loads(json.dumps(report.to_dict()))["units"]
    assert plain[-1]["video"] == 0 and plain[-1]["frames"][-1] == frames - 1
    assert plain[-1]["kept"]["3"] == 1


@pytest.mark.skipif(not ENCODES_FIRST, reason="hands beams the wrong pictures, pruned or not")
def test_beams_share_their_prompts_units(name, models):
    inputs = FAMILIES[name].batch(models["sdpa"], ((0,), 4), (((1,),), 9))
    method = vtp.FastV(2, 1, per="frame")
    with vtp.prune(models["sdpa"], method) as run:
        models["sdpa"].generate(**inputs, **GREEDY, num_beams=2)
        units = run.report().units
        models["sdpa"].generate(**inputs, **GREEDY)
    once = run.report().units
    assert len(units) == 2 * len(once)
    assert {unit["prompt"] for unit in units} == {0, 1, 2, 3}
    assert all(unit["kept"][2] == 1 for unit in units)


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"], scope="module")
@pytest.mark.parametrize("text_keep", [0.0, 0.5, "knee"])
def test_timestamps_stay_where_text_leaves(name, text_keep):
    """Before the frames (Qwen3-VL) or behind them (GLM), the first and the last among them."""
    family = FAMILIES[name]
    models = {kind: family.model(kind) for kind in ("sdpa", "eager")}
    shown = ((1,),) if name == "glm4v" else (0, (1,))
    inputs = family.batch(models["sdpa"], (shown, 9), (((1,),), 4), ((), 5))
    method = vtp.InflectionPruning(
        None, llm_layers=(2, 4), visual_keep=0.5, text_keep=text_keep, protect_template=False
    )
    with vtp.prune(models["sdpa"], method) as run:
        pruned = models["sdpa"].generate(**inputs, **GREEDY, **DETAILS)
    kept, ids = run.report().kept, inputs["input_ids"]
    with MaskedReference(models["eager"], {2: None, 4: None}, given=kept):
        assert_same(pruned, models["eager"].generate(**inputs, **GREEDY, **DETAILS))
    video, left = family.tiny.video, 0
    for b, row in enumerate(ids.tolist()):
        text = kept[4][b] & ~kept.visual[b]
        for at in range(len(row)):
            for marks in filter(None, (video.before, video.after)):
                if tuple(row[at : at + len(marks)]) == marks:
                    assert kept[4][b, at : at + len(marks)].all()
        left += int((inputs["attention_mask"][b].bool() & ~kept.visual[b] & ~text).sum())
    assert left > 0 or text_keep == "knee"


# --- what is not told ---------------------------------------------------------------------------


def test_tiles_among_words_are_of_no_known_picture():
    """Of Idefics: how many tiles a picture has, its inputs do not tell."""
    family = FAMILIES["idefics3"]
    model = family.model("sdpa")
    pixels = torch.randn(1, 3, 3, 56, 56)
    ids = torch.tensor([[1, *[IMAGE] * 4, 5, *[IMAGE] * 4, 6, *[IMAGE] * 4, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with (
        vtp.prune(model, vtp.FastV(2, 0.5, per="picture")),
        pytest.raises(NotImplementedError, match=r"idefics3 cannot run FastV.*which picture or"),
    ):
        model.generate(**inputs, **GREEDY)
    with vtp.prune(model, vtp.FastV(2, 0.5)) as run:
        model.generate(**inputs, **GREEDY)
    assert run.report().units is None and run.report().to_dict()["units"] is None


def test_glm_takes_pictures_or_videos():
    """It has one token for both."""
    family = FAMILIES["glm4v"]
    model = family.model("sdpa")
    inputs = family.batch(model, ((0, (0,)), 4))
    with (
        vtp.prune(model, vtp.FastV(2, 0.5)),
        pytest.raises(NotImplementedError, match="pixel_values, pixel_values_videos: GLM has one"),
    ):
        model.generate(**inputs, **GREEDY)


@pytest.mark.skipif(not ENCODES_FIRST, reason="fails in another place")
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_glm_has_no_videos_in_repeated_prompts(settings):
    """Nor has the model without a method: there transformers fails about an empty list."""
    family = FAMILIES["glm4v"]
    model = family.model("sdpa")
    inputs = family.batch(model, (((0,),), 4), ((), 3))
    settings = {"max_new_tokens": 2, "do_sample": "num_beams" not in settings, **settings}
    with pytest.raises(ValueError, match="non-empty list"):
        model.generate(**inputs, **settings)
    with (
        vtp.prune(model, vtp.FastV(2, 0.5)),
        pytest.raises(NotImplementedError, match="num_beams, num_return_sequences: transformers l"),
    ):
        model.generate(**inputs, **settings)


@pytest.mark.skipif(not ENCODES_FIRST, reason="takes no encoded pictures")
def test_features_that_come_from_elsewhere_do_not_tell():
    family = FAMILIES["qwen2_5_vl"]
    model = family.model("sdpa")
    inputs = family.batch(model, (((0,),), 4))
    with torch.no_grad():
        video = {name: inputs.pop(name) for name in ("pixel_values_videos", "video_grid_thw")}
        encoded = {"video": model.model.get_video_features(**video, return_dict=True)}
        inputs |= {"video_grid_thw": video["video_grid_thw"], "mm_encoder_outputs": encoded}
        with vtp.prune(model, vtp.FastV(2, 0.5, per="frame")):
            model(**inputs)
            positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
            del inputs["video_grid_thw"]
            with pytest.raises(NotImplementedError, match="video_grid_thw: a call that does not"):
                model(**inputs, position_ids=positions)


def test_groups_and_counts_must_fit():
    class Wrong(FirstFrame):
        def decide(self, layer, rows):
            return rows.keep_of_each(rows.unit, self.there, self.counts, rows.hidden[..., 0])

    family = FAMILIES["qwen2_5_vl"]
    model = family.model("sdpa")
    inputs = family.batch(model, ((0,), 4))
    for there, counts, message in (
        ([[15]], [[4]], r"prompt 0: groups have not \[15\] rows"),
        ([[16]], [[17]], "prompt 0, group, prompt 0: cannot keep 17 of 16 visual tokens"),
    ):
        Wrong.there, Wrong.counts = there, counts
        with vtp.prune(model, Wrong()), torch.no_grad(), pytest.raises(ValueError, match=message):
            model(**inputs)
