"""Pruning with deciders: what stays, in batches and alone, and that it is what they were taught."""

import copy
import dataclasses
import gc
import pickle
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

from tiny_llava import DEPTH, batch, prompt, three, tiny_llava

import vtp_kernels as vtp
from vtp_kernels.methods import method_from_spec
from vtp_kernels.methods.lvpruning import method as lvpruning
from vtp_kernels.methods.lvpruning.deciders import Deciders
from vtp_kernels.methods.lvpruning.decisions import Sides
from vtp_kernels.methods.lvpruning.files import Fit, load_deciders, save_deciders
from vtp_kernels.models.families import parts_of
from vtp_kernels.models.masked_run import MaskedRun

LAYERS, RATIOS = (1, 3), (0.5, 0.25)


def deciders_for(model, folder, seed=0, width=16, dtype=None):
    """Random ones, wide enough apart that ranks are clear."""
    torch.manual_seed(seed)
    fit = Fit.of("llava", model.config.text_config, LAYERS, width)
    deciders = Deciders(fit.shape)
    with torch.no_grad():
        for parameter in deciders.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    save_deciders(folder, deciders, fit, {}, dtype)
    return str(folder)


@pytest.fixture(scope="module")
def model():
    return tiny_llava("eager")


@pytest.fixture
def method(model, tmp_path):
    return vtp.LVPruning(deciders_for(model, tmp_path / "deciders"), LAYERS, RATIOS)


def prefill(model, method, inputs):
    with torch.no_grad(), vtp.prune(model, method) as run:
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits, run.report()


class Ranked:
    """What stays, told again: nothing is removed, and deciders run prompt by prompt."""

    def __init__(self, deciders, inputs, ratios=RATIOS):
        self.deciders, self.ratios = deciders, dict(zip(LAYERS, ratios, strict=True))
        self.real = inputs["attention_mask"].bool()
        self.visual = inputs["input_ids"] == 99
        self.open = self.visual.clone()
        self.kept = {}

    def decide(self, layer, hidden):
        for b in range(len(hidden)):
            left = self.open[b].nonzero()[:, 0]
            if not len(left):
                continue
            text = (self.real[b] & ~self.visual[b]).nonzero()[:, 0]
            logits = self.deciders[layer](hidden[b : b + 1, left], hidden[b : b + 1, text], None)
            scores = (logits[0, :, 0] - logits[0, :, 1]).tolist()
            count = int(self.ratios[layer] * int(self.visual[b].sum()))
            best = sorted(zip(scores, left.tolist(), strict=True), reverse=True)[:count]
            self.open[b] = False
            self.open[b, [j for _, j in best]] = True
        self.kept[layer] = self.open.clone()
        return torch.where(self.visual, self.open.float(), 1.0)


@pytest.mark.parametrize("ratios", [RATIOS, (0.7, 0.0), (1.0, 0.3)])
def test_removing_is_masking_what_the_deciders_rank_last(model, method, ratios):
    """With the very attention that deciders are trained with: training and inference agree."""
    inputs = three()
    logits, report = prefill(model, dataclasses.replace(method, ratios=ratios), inputs)
    told = Ranked(load_deciders(method.modules_path), inputs, ratios)
    with torch.no_grad(), MaskedRun(parts_of(model), LAYERS, told.decide) as run:
        run.valid = inputs["attention_mask"].bool()
        reference = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
    for layer, kept in report.kept.items():
        assert torch.equal(kept & told.visual, told.kept[layer])
    for layer, ratio in zip(LAYERS, ratios, strict=True):
        assert report.visual_tokens_per_layer[layer] == [int(ratio * n) for n in (16, 32, 48, 0)]


def test_a_batch_keeps_what_its_prompts_keep_alone(model, method):
    prompts = [prompt(1, 9, 0), prompt(2, 3, 1), prompt(0, 5, 3), prompt(3, 6, 2)]
    together = batch(*prompts)
    logits, report = prefill(model, method, together)
    pictures = together["pixel_values"].split([1, 2, 0, 3])
    for b, (tokens, images) in enumerate(zip(prompts, pictures, strict=True)):
        if not len(images):
            continue
        alone = batch(tokens) | {"pixel_values": images}
        logits_alone, report_alone = prefill(model, method, alone)
        torch.testing.assert_close(logits[b], logits_alone[0], rtol=1e-4, atol=1e-4)
        for layer in LAYERS:
            assert torch.equal(report.kept[layer][b, -len(tokens) :], report_alone.kept[layer][0])


def test_the_question_decides(model, method):
    one, other = (batch(prompt(1, 7, seed=0)) for _ in range(2))
    other["input_ids"][0, -1] = 50
    kept = [prefill(model, method, inputs)[1].kept[1] for inputs in (one, other)]
    assert not torch.equal(*kept)


def test_drafts_do_not_decide(model, method):
    """Assisted decoding reads its drafts along with the prompt."""
    inputs = three()
    plain = prefill(model, method, inputs)[1]
    drafts = torch.tensor([[7, 8, 9]]).expand(4, 3)
    longer = inputs | {
        "input_ids": torch.cat((inputs["input_ids"], drafts), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(drafts)), 1),
    }
    with torch.no_grad(), vtp.prune(model, method) as run:
        model(**longer, logits_to_keep=4)
    for layer in LAYERS:
        assert torch.equal(run.report().kept[layer][:, :-3], plain.kept[layer])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generates_as_the_masked_model_does(model, method, settings):
    inputs = three()
    with vtp.prune(model, method):
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **settings)
    assert tokens.shape == (4, inputs["input_ids"].shape[1] + 4)
    if "num_beams" in settings:
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if settings:  # without a cache every step is a prompt of its own
        for _ in range(4):
            given = inputs | {"input_ids": ids, "attention_mask": mask}
            new = prefill(model, method, given)[0].argmax(-1, keepdim=True)
            ids, mask = torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
    else:
        told = Ranked(load_deciders(method.modules_path), inputs)
        policies = {}
        for step in range(4):

            def decide(layer, hidden, step=step):
                if not step:
                    policies[layer] = told.decide(layer, hidden)
                more = hidden.shape[1] - policies[layer].shape[1]
                return torch.nn.functional.pad(policies[layer], (0, more), value=1.0)

            given = inputs | {"input_ids": ids, "attention_mask": mask}
            with torch.no_grad(), MaskedRun(parts_of(model), LAYERS, decide) as run:
                run.valid = mask.bool()
                new = model(**given, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
    assert torch.equal(tokens, ids)


def test_without_pictures_nothing_happens(model, method):
    inputs = batch(prompt(0, 5, 3))
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtp.prune(model, method):
            assert torch.equal(model(**inputs).logits, plain)


def test_all_of_them_leaves_all(model, method):
    inputs = three()
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits[:, -1]
    logits, report = prefill(model, dataclasses.replace(method, ratios=(1.0, 1.0)), inputs)
    assert torch.equal(logits, plain) and not report.kept
    assert report.flops_reduction == 0  # nothing was asked


def test_half_precision_models(tmp_path):
    model = tiny_llava("sdpa", dtype=torch.bfloat16)
    folder = deciders_for(model, tmp_path, dtype=torch.float16)
    logits, report = prefill(model, vtp.LVPruning(folder, LAYERS, RATIOS), three())
    assert logits.isfinite().all() and report.visual_tokens_per_layer[3] == [4, 8, 12, 0]


def test_savings_are_less_what_deciding_costs(model, method):
    inputs = three()
    report = prefill(model, method, inputs)[1]
    same = prefill(model, vtp.Schedule({1: 0.5, 3: 0.25}), inputs)[1]
    shape = load_deciders(method.modules_path).shape
    text = [
        total - images for total, images in zip(same.dense_tokens, (16, 32, 48, 0), strict=True)
    ]
    spent = sum(
        shape.flops(words, images) + (shape.flops(words, images // 2))
        for words, images in zip(text, (16, 32, 48, 0), strict=True)
        if images
    )
    assert report.tokens_per_layer == same.tokens_per_layer
    assert report.prefill_flops == same.prefill_flops + spent


# --- settings and files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "tokens", "stay"), [(0.3, 576, 172), (0.1, 576, 57), (0.29, 100, 29), (1, 7, 7)]
)
def test_shares_are_rounded_down(ratio, tokens, stay):
    assert lvpruning.kept_tokens(ratio, tokens) == stay


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": (1, 2)}, ValueError, r"LVPruning\.ratios: expected one for each"),
        ({"layers": ()}, ValueError, r"LVPruning\.ratios"),
        ({"layers": (3, 1), "ratios": (0.5, 0.1)}, ValueError, r"LVPruning\.layers: .*ascend"),
        ({"layers": (-1, 8, 16)}, ValueError, r"LVPruning\.layers\[0\]: .* got -1"),
        ({"ratios": (0.1, 0.3, 0.5)}, ValueError, r"LVPruning\.ratios: .*not grow"),
        ({"ratios": (1.5, 0.3, 0.1)}, ValueError, r"LVPruning\.ratios\[0\]: .*0 to 1, got 1\.5"),
        ({"ratios": ("a", 0.3, 0.1)}, TypeError, r"LVPruning\.ratios\[0\]"),
        ({"ratios": (float("nan"), 0.3, 0.1)}, ValueError, r"LVPruning\.ratios\[0\]"),
        ({"modules_path": 3}, TypeError, r"LVPruning\.modules_path: expected a folder, got 3"),
    ],
)
def test_settings_that_make_no_sense(settings, error, message):
    with pytest.raises(error, match=message):
        vtp.LVPruning(**settings)


def test_survives_a_file(method, tmp_path):
    method.save(tmp_path / "method.json")
    assert vtp.LVPruning.load(tmp_path / "method.json") == method
    assert method.to_dict() == {
        "method": "lvpruning",
        "modules_path": method.modules_path,
        "layers": [1, 3],
        "ratios": [0.5, 0.25],
    }


def test_specs(method):
    folder = method.modules_path
    assert method_from_spec(f"lvpruning:{folder}:0.5,0.25") == method
    assert method_from_spec("lvpruning") == vtp.LVPruning()
    assert method_from_spec("lvpruning::0.6,0.4,0.2").ratios == (0.6, 0.4, 0.2)
    with pytest.raises(ValueError, match="holds no trained deciders"):
        method_from_spec("lvpruning:nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 32}, "hidden size 64, the model's is 32"),
        ({"num_hidden_layers": 5}, "decoder layers 6, the model's is 5"),
        ({"text": "qwen2"}, "text model 'llama', the model's is 'qwen2'"),
    ],
)
def test_a_model_they_are_not_for(method, settings, message):
    with pytest.raises(ValueError, match=message):
        vtp.apply(tiny_llava(**settings), method)


def test_layers_without_deciders(model, method):
    with pytest.raises(ValueError, match=r"LVPruning\.layers: .*no deciders for layers \[2\]"):
        vtp.apply(model, dataclasses.replace(method, layers=(1, 2)))
    with pytest.raises(ValueError, match=r"there is no layer 16, the model has 6"):
        vtp.apply(model, dataclasses.replace(method, layers=(1, 16)))
    with torch.no_grad(), vtp.prune(model, dataclasses.replace(method, layers=(3,), ratios=(0.1,))):
        model(**three(), logits_to_keep=1)  # some of them will do


def test_pruning_needs_trained_deciders(model):
    with pytest.raises(ValueError, match="pruning needs trained deciders; train them with"):
        vtp.apply(model, vtp.LVPruning(layers=(1,), ratios=(0.5,)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("deciders.safetensors", lambda path: path.unlink(), "there is no deciders.safetensors in"),
        (
            "deciders.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "is cut short",
        ),
        ("deciders.json", lambda path: path.unlink(), "holds no trained deciders"),
        ("deciders.json", lambda path: path.write_text('{"format"'), "is no JSON that can be read"),
    ],
    ids=["weights gone", "weights cut", "description gone", "description cut"],
)
def test_files_that_are_gone_or_cut_are_noticed_when_applied(model, method, name, damage, message):
    damage(Path(method.modules_path, name))
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=rf"modules_path: .*{message}"):
        vtp.apply(model, method)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    vtp.apply(model, vtp.FastV(2)).remove()


def test_files_may_go_once_they_have_been_read(model, method):
    inputs = three()
    with torch.no_grad(), vtp.prune(model, method) as run:
        expected = model(**inputs, logits_to_keep=1).logits
        flops = run.report().prefill_flops
        for path in Path(method.modules_path).iterdir():
            path.unlink()
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, expected)
        assert run.report().prefill_flops == flops


def test_deciders_are_read_once_and_shared_and_let_go(model, method):
    other = dataclasses.replace(method, ratios=(0.4, 0.1))
    for each in (method, method, other):
        prefill(model, each, three())
    (ours,), (theirs,) = method._loaded.values(), other._loaded.values()
    assert ours is theirs
    mine = [key for key in lvpruning._in_use if str(key[0]).startswith(method.modules_path)]
    assert len(mine) == 1
    copies = [copy.deepcopy(method), pickle.loads(pickle.dumps(method))]
    assert copies == [method, method] and not any(x._loaded for x in copies)
    method._loaded.clear(), other._loaded.clear()
    del ours, theirs
    gc.collect()
    assert mine[0] not in lvpruning._in_use


def test_new_weights_in_the_folder_are_read_by_a_new_method(model, method):
    before = prefill(model, method, three())[1].kept[1]
    deciders_for(model, method.modules_path, seed=5)
    after = prefill(model, dataclasses.replace(method), three())[1].kept[1]
    assert not torch.equal(before, after)


def test_sides_of_masks(draw):
    visual = draw.bools(3, 12)
    visual[2] = False
    text = ~visual & draw.bools(3, 12, p=0.8)
    text[:, 0] = True
    visual[:, 0] = False
    sides = Sides.of(visual, text)
    for mask, at, valid in (
        (visual, sides.visual_at, sides.visual_valid),
        (text, sides.text_at, sides.text_valid),
    ):
        for b in range(3):
            assert at[b][valid[b]].tolist() == mask[b].nonzero()[:, 0].tolist()


def test_depth_of_the_tiny_model():
    assert max(LAYERS) < DEPTH
