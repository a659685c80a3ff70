"""`vtp-kernels flops`: published figures from a configuration alone."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlavaConfig, MistralConfig, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parent / "models"))

from tiny_llava import batch, prompt, tiny_llava
from tiny_models import FAMILIES

import vtp_kernels as vtp
from vtp_kernels import VisiPruner
from vtp_kernels.accounting import Course, account, accounts, text_config
from vtp_kernels.cli import main
from vtp_kernels.methods import method_from_spec
from vtp_kernels.methods.lvpruning.deciders import Shape
from vtp_kernels.methods.lvpruning.published import published_flops

LLAVA = {"text": 64, "before": 35, "visual": 576}


@pytest.fixture(scope="module")
def config():
    return text_config("llava-1.5-7b")


def accounted(config, spec, course=Course()):  # noqa: B008
    return account(config, method_from_spec(spec), **LLAVA, course=course)


def test_dense(config):
    """4.252 TMAC with 64 tokens of text; 3.82 TMAC for the visual ones (VisiPruner's table)."""
    dense = accounted(config, "none")
    assert dense.flops / 2e12 == pytest.approx(4.252, abs=5e-4)
    assert dense.visual_macs / 1e12 == pytest.approx(3.82, abs=5e-3)


def test_visipruner_saves_what_it_says(config):
    """53.9 % of the FLOPs: six passive layers, all tokens up to layer 14, none after."""
    dense = accounted(config, "none")
    skip = accounted(config, "visipruner:shallow_attention=skip")
    assert 1 - skip.flops / dense.flops == pytest.approx(0.539, abs=2e-3)
    exact = accounted(config, "visipruner")
    assert skip.flops < exact.flops < dense.flops
    assert exact.visual_per_layer == [576] * 15 + [0] * 17


@pytest.mark.parametrize(
    "behind, fusion_layer, less", [(21, 14, 0.983), (1, 14, 0.999), (51, 9, 0.983), (3, 9, 0.999)]
)
def test_visipruner_reads_as_little_as_it_says(config, behind, fusion_layer, less):
    """98.3 to 99.9 % less, if only what text reads of visual tokens counts as needed."""
    prompt = {"text": 35 + behind, "before": 35, "visual": 576}
    course = Course(fusion_layer=fusion_layer)
    dense = account(config, None, **prompt, course=course)
    pruned = account(config, method_from_spec("visipruner"), **prompt, course=course)
    assert 1 - pruned.visual_reads / dense.visual_pairs == pytest.approx(less, abs=1e-3)


def test_a_course_of_its_own(config):
    course = Course(fusion_layer=9, kept=10, exit_layer=23)
    counts = accounted(config, "visipruner", course).visual_per_layer
    assert counts == [576] * 10 + [10] * 14 + [0] * 8
    counts = accounted(config, "visipruner:stages=middle", course).visual_per_layer
    assert counts == [576] * 10 + [10] * 22


@pytest.mark.parametrize(
    "course, message",
    [
        (Course(fusion_layer=32), "fusion_layer: expected a layer from 7 to 30, got 32"),
        (Course(fusion_layer=3), "fusion_layer: expected a layer from 7 to 30, got 3"),
        (Course(exit_layer=-1), "exit_layer: expected a layer from 16 to 30, got -1"),
        (Course(14, 5, exit_layer=12), "exit_layer: expected a layer from 16 to 30, got 12"),
        (Course(14, 5, exit_layer=15), "exit_layer: expected a layer from 16 to 30, got 15"),
        (Course(kept=577), "kept: expected 0 to 576 tokens, got 577"),
    ],
)
def test_impossible_courses_are_refused(config, course, message):
    """Layers 0 to 6 are not judged, nor is the last, and two votes are cast after fusion."""
    with pytest.raises(ValueError, match=message):
        accounted(config, "visipruner", course)


def test_courses_are_those_of_the_method(config):
    alone = "visipruner:shallow_layers=0,stages=deep,exit_votes=1"
    assert accounted(config, alone, Course(exit_layer=0)).visual_per_layer == [576] + [0] * 31
    with pytest.raises(ValueError, match="exit_layer: expected a layer from 15 to 30, got 14"):
        accounted(config, "visipruner:exit_votes=1", Course(14, 5, exit_layer=14))
    with pytest.raises(ValueError, match="kept: expected 28 to 576 tokens, got 27"):
        accounted(config, "visipruner:min_keep=28", Course(kept=27))


@pytest.mark.parametrize("decision, layers", [("exact", 1), ("pipelined", 2)])
def test_a_course_is_what_a_model_goes_through(decision, layers):
    """Every token turns the output at once, and none of them is long enough to stay."""
    method = VisiPruner(("middle",), 0, 2.0, 1e9, decision=decision)
    model = tiny_llava()
    with vtp.prune(model, method) as run, torch.no_grad():
        model(**batch(prompt(1, 5, seed=0)))
    found = account(
        model.config.text_config, method, text=11, before=4, visual=16, course=Course(0)
    )
    reported = [counts[0] for counts in run.report().visual_tokens_per_layer]
    assert found.visual_per_layer == reported == [16] * layers + [0] * (6 - layers)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ({"before": 65}, "before: expected at most the 64 tokens of text, got 65"),
        ({"before": -1}, "before: expected at least 0 tokens, got -1"),
        ({"visual": 0}, "visual: expected at least 1 tokens, got 0"),
    ],
)
def test_impossible_prompts_are_refused(config, prompt, message):
    with pytest.raises(ValueError, match=message):
        account(config, None, **LLAVA | prompt, course=Course())


def test_a_method_that_cannot_be_counted_leaves_the_others(capsys):
    command = ["flops", "--model", "llava-1.5-7b", "--method", "inflection", "fastv:2:0.5"]
    assert main(command) == 0
    page = capsys.readouterr().out
    assert "fastv:2:0.5  " in page
    assert "inflection: what inflection keeps depends on the picture" in page
    assert main([*command, "--json"]) == 0
    accounts = json.loads(capsys.readouterr().out)
    assert accounts["fastv:2:0.5"]["flops"] < accounts["none"]["flops"]
    assert "depends on the picture" in accounts["inflection"]["error"]


def test_what_no_model_could_run_is_not_counted(tmp_path, capsys):
    """A layer that is not there; a language model whose layers were not looked at."""
    FAMILIES["qwen3_vl"].make().config.save_pretrained(tmp_path / "qwen3_vl")
    command = ["flops", "--model", str(tmp_path / "qwen3_vl"), "--method"]
    assert main([*command, "fastv:6:0.5", "fastv:3:0.5"]) == 0
    page = capsys.readouterr().out
    assert "fastv:6:0.5: FastV.layer: there is no layer 6" in page and "fastv:3:0.5  " in page
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert main(["flops", "--model", str(tmp_path / "gpt2"), "--method", "fastv"]) == 2
    assert "FLOPs of a 'gpt2' language model are not known" in capsys.readouterr().err


def test_what_the_published_counts_do_not_have(tmp_path, capsys):
    """Experts, and windows that are shorter than the prompt: FLOPs are known all the same."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    Qwen3MoeConfig(**sizes, num_key_value_heads=2).save_pretrained(tmp_path)
    command = ["flops", "--model", str(tmp_path), "--method", "fastv", "--json"]
    assert main(command) == 0
    dense, pruned = json.loads(capsys.readouterr().out).values()
    assert pruned["flops"] < dense["flops"] and pruned["visual_pairs"] < dense["visual_pairs"]
    assert dense["visual_macs"] is None
    MistralConfig(**sizes, num_key_value_heads=2, sliding_window=512).save_pretrained(tmp_path)
    assert main(command) == 0
    dense, pruned = json.loads(capsys.readouterr().out).values()
    assert pruned["flops"] < dense["flops"]
    assert {dense[x] for x in ("visual_macs", "visual_pairs", "visual_reads")} == {None}
    assert main(command[:-1]) == 0
    assert "%  not known" in capsys.readouterr().out
    assert main([*command, "--text", "10", "--visual", "500"]) == 0
    assert json.loads(capsys.readouterr().out)["none"]["visual_pairs"] is not None


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_pairs_of_rows_that_see_ahead_are_not_causal(name):
    """With a prompt that every window holds."""
    config = FAMILIES[name].make().config
    prompt = {"text": 3, "before": 1, "visual": 4, "course": Course()}
    found = accounts(config, {"none": None, "random": vtp.RandomPruning(2, 0.5)}, **prompt)
    for one in found.values():
        assert one.visual_pairs is None and one.visual_reads is None and one.flops
    causal = accounts(config.text_config, {"none": None}, **prompt)
    assert causal["none"].visual_pairs and causal["none"].flops == found["none"].flops


def test_options_of_the_command_line_that_cannot_be(capsys):
    command = ["flops", "--model", "llava-1.5-7b", "--method"]
    for arguments, message in (
        (["visipruner", "--exit-layer", "9"], "exit_layer: expected a layer from 16 to 30, got 9"),
        (["fastv", "--kept", "9"], "--kept: is of visipruner, which is not among the methods"),
        (["fastv", "--text", "20", "--before", "35"], "before: expected at most the 20 tokens"),
    ):
        assert main([*command, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main([*command, "fastv", "--text", "20"]) == 0


def test_scheduled_methods(config):
    counts = accounted(config, "pyramiddrop:8=0.5,16=0.25,24=0.125").visual_per_layer
    assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


def test_command_line(capsys):
    command = ["flops", "--model", "llava-1.5-7b", "--method", "visipruner", "fastv:2:0.5"]
    assert main(command) == 0
    page = capsys.readouterr().out
    assert "none         8.50 T" in page and "576 x15, 0 x17 (6 passive)" in page
    assert main([*command, "--json"]) == 0
    accounts = json.loads(capsys.readouterr().out)
    assert list(accounts) == ["none", "visipruner", "fastv:2:0.5"]
    assert main([*command[:-1], "fastv:40:0.5"]) == 0
    page = capsys.readouterr().out  # the others are not lost for it
    assert "there is no layer 40" in page and "576 x15, 0 x17 (6 passive)" in page


@pytest.mark.parametrize(
    ("ratios", "tera"),
    [((0.6, 0.4, 0.2), 3.97), ((0.5, 0.3, 0.1), 3.18), ((0.45, 0.25, 0.05), 2.79)],
)
def test_lvpruning_s_published_figures(ratios, tera):
    """8.38 TFLOPs dense, 52.6, 62.1 and 66.7 % less; the paper cuts behind the second digit."""
    dense, pruned = (published_flops(LlavaConfig(), x).total / 1e12 for x in (None, ratios))
    assert dense == pytest.approx(8.38, abs=5e-3)
    assert math.floor(100 * pruned) / 100 == tera
    assert 1 - tera / 8.38 == pytest.approx({3.97: 0.526, 3.18: 0.621, 2.79: 0.667}[tera], abs=5e-4)


def test_lvpruning_s_three_deciders_cost_what_it_says():
    """0.71 TFLOPs, looking at all 576 tokens; its layers hold 606, 318, 202 and 87 rows."""
    all_stay = published_flops(LlavaConfig(), (1.0, 1.0, 1.0))
    assert all_stay.deciders / 1e12 == pytest.approx(0.71, abs=5e-3)
    language = published_flops(LlavaConfig(), (0.5, 0.3, 0.1)).language
    per_row = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert language == per_row * (606 + 7 * 318 + 8 * 202 + 16 * 87)


def test_lvpruning_is_charged_for_its_deciders(config):
    """Attention included, and 64 tokens of text: not the paper's recipe."""
    pruned = accounted(config, "lvpruning")
    assert pruned.visual_per_layer == [576] + [288] * 7 + [172] * 8 + [57] * 16
    same = accounted(config, "schedule:1=288,8=172,16=57")
    shape = Shape(4096, 4096, (1, 8, 16))
    deciders = sum(shape.flops(64, visual) for visual in (576, 288, 172))
    assert pruned.flops == same.flops + deciders
    nothing = accounted(config, "lvpruning::1.0,1.0,1.0")
    assert nothing.flops == accounted(config, "none").flops


def test_lvpruning_table(capsys):
    assert main(["lvpruning", "flops"]) == 0
    page = capsys.readouterr().out
    assert "8.380" in page and "3.975     52.6%" in page
    assert main(["lvpruning", "flops", "--ratios", "0.3,0.2,0.1"]) == 0
    assert "0.3, 0.2, 0.1" in capsys.readouterr().out
    assert main(["lvpruning", "flops", "--ratios", "0.3,0.2"]) == 2
    assert "ratios: expected one for each" in capsys.readouterr().err
