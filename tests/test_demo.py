"""The demo and the command line, on the trained pocket LLaVA."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

import vtp_kernels as vtp
from benchmarks import __main__ as benchmarks
from vtp_kernels import cli, demo
from vtp_kernels.chat import chat_inputs
from vtp_kernels.plot.sheet import CAPTION, GAP
from vtp_kernels.plot.tokens import SMALL
from vtp_kernels.pocket_llava import scenes
from vtp_kernels.pocket_llava.model import TRAINED


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    picture = tmp_path_factory.mktemp("demo") / "kept.png"
    return demo.pocket(repeats=1, picture=picture)


def test_every_method_answers_every_question(comparison):
    assert [row.method for row in comparison.rows] == [demo.DENSE, *demo.pocket_methods()]
    assert len(comparison.prompts) == len(scenes.KINDS)
    for row in comparison.rows:
        assert len(row.answers) == len(comparison.prompts) and all(row.answers)
        assert row.correct == sum(
            a == e for a, e in zip(row.answers, comparison.expected, strict=True)
        )


def test_dense_has_every_token_and_the_methods_have_fewer(comparison):
    dense, *pruned = comparison.rows
    assert dense.visual_tokens_per_layer == [256] * 8
    assert dense.flops_reduction == 0 and dense.prefill_speedup == 1
    for row in pruned:
        assert row.visual_tokens_per_layer[-1] < 256
        assert 0 < row.flops_reduction < 1 and row.kv_bytes < dense.kv_bytes
        assert len(row.prefill_ms) == 1 and row.prefill_speedup > 0


def test_stages_group_equal_layers(comparison):
    fastv = next(row for row in comparison.rows if row.method == "FastV")
    assert fastv.stages() == "256 x2, 128 x6"


def test_picture_has_a_column_a_method(comparison):
    width = (1 + len(demo.pocket_methods())) * (SMALL + GAP) - GAP
    assert Image.open(comparison.picture).size == (width, CAPTION + 3 * (SMALL + CAPTION) + GAP)


def test_text_and_json_say_the_same(comparison):
    text, values = str(comparison), json.loads(json.dumps(comparison.to_dict()))
    for row in values["rows"]:
        assert row["method"] in text
    assert "(truth)" in text and values["expected"] == comparison.expected


def test_flops_that_are_not_known():
    row = demo.Row("dense", ["red"], [4], None, 1)
    assert "not known" in str(demo.Comparison(["what?"], [row], None))


def test_wrong_answers_are_marked():
    row = demo.Row("dense", ["red", "blue"], [4], 0.0, 1)
    text = str(demo.Comparison(["a", "b"], [row], ["red", "green"]))
    assert "blue (wrong)" in text and "red (wrong)" not in text


def test_a_picture_of_ones_own(tmp_path):
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "own.png")
    out = tmp_path / "kept.png"
    comparison = demo.pocket(tmp_path / "own.png", repeats=1, picture=out)
    assert comparison.expected is None and out.exists()


@pytest.fixture(scope="module")
def report():
    """Of the question how many shapes there are in the demo's picture."""
    model, processor = demo.load(TRAINED)
    picture = Image.fromarray(scenes.scene("demo", 1).image)
    inputs = chat_inputs(processor, [picture], ["how many shapes"])

    def made(method):
        with vtp.prune(model, method) as run, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        return run.report()

    return made


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_json(capsys, tmp_path):
    out = tmp_path / "kept.png"
    given = ("--out", str(out), "--html", str(tmp_path / "kept.html"))
    code, text, _ = run(capsys, "demo", "--json", "--repeats", "1", *given)
    values = json.loads(text)
    assert code == 0 and out.exists()
    page = Path(values["page"]).read_text()
    assert all(f"{i + 1}: {asked}" in page for i, asked in enumerate(values["prompts"]))
    assert {row["method"] for row in values["rows"]} >= {"dense", "FastV"}
    assert values["info"]["versions"]["torch"]


def test_run_with_a_checkpoint_and_a_method_file(capsys, tmp_path):
    vtp.FastV(layer=3, keep=32).save(tmp_path / "method.json")
    Image.fromarray(scenes.scene("test", 0).image).save(tmp_path / "picture.png")
    code, text, _ = run(
        capsys,
        "run",
        *("--model", str(TRAINED), "--image", str(tmp_path / "picture.png")),
        *("--prompt", "how many shapes", "--prompt", "where is the circle"),
        *("--method", str(tmp_path / "method.json"), "--max-new-tokens", "4"),
        *("--method", "divprune:keep=16"),
        *("--out", str(tmp_path / "kept.png"), "--repeats", "1", "--json"),
        *("--html", str(tmp_path / "kept.html")),
    )
    rows = json.loads(text)["rows"]
    assert code == 0 and "where is the circle" in (tmp_path / "kept.html").read_text()
    assert rows[1]["visual_tokens_per_layer"] == [256] * 3 + [32] * 5
    assert rows[2]["visual_tokens_per_layer"] == [16] * 8 and len(rows) == 3


def test_a_server_takes_one_method(capsys):
    given = ("--model", "none", "--method", "fastv:2:0.5", "--method", "divprune")
    with pytest.raises(SystemExit):
        run(capsys, "serve", *given)
    error = capsys.readouterr().err
    assert "--method: expected one, got 'fastv:2:0.5' and 'divprune'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "no.png"), "image: no such file: 'no.png'"),
        (("--method", "fastest"), "fastest"),
        (("--method", "fastv:99"), "layer"),
        (("--method", "fastv:2:1.5"), "keep"),
    ],
)
def test_run_says_what_is_wrong_in_one_line(capsys, tmp_path, arguments, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    given = {"--image": str(tmp_path / "picture.png"), "--method": "fastv", "--prompt": "how many"}
    given |= {"--model": str(TRAINED), "--out": str(tmp_path / "out.png")}
    given |= dict([arguments])
    code, _, error = run(capsys, "run", *(part for pair in given.items() for part in pair))
    lines = [line for line in error.splitlines() if line.startswith("vtp-kernels run: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "--image, --video: expected at least one of them"),
        (["--video", "none"], "video: no such file or folder: 'none'"),
    ],
)
def test_run_wants_a_picture_or_a_video(capsys, files, message):
    code, _, error = run(capsys, "run", "--model", "none", "--prompt", "what", *files)
    assert code == 2 and error.splitlines()[-1] == f"vtp-kernels run: {message}"


def test_without_matplotlib_nothing_is_answered(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "it.png")
    given = ("--model", "none", "--prompt", "what", "--image", str(tmp_path / "it.png"))
    code, _, error = run(capsys, "run", *given, "--out", str(tmp_path / "kept.png"))
    assert code == 2 and "pip install 'vtp_kernels[plot]'" in error  # before the model is loaded
    monkeypatch.setattr(demo, "greedy_answers", lambda *given: pytest.fail("an answer"))
    with pytest.raises(ImportError, match=r"pip install 'vtp_kernels\[plot\]'"):
        demo.pocket(picture=tmp_path / "kept.png")


def test_plot_tokens_and_layers_of_saved_reports(capsys, tmp_path, report):
    scene = tmp_path / "scene.png"
    Image.fromarray(scenes.scene("demo", 1).image).save(scene)
    files = []
    for name, method in (("a", vtp.FastV(2, 0.5)), ("b", vtp.FastV(4, 32))):
        files.append(str(tmp_path / f"{name}.json"))
        report(method).save(files[-1])
    for kind, given in (("tokens", ["--image", str(scene)]), ("layers", [])):
        for chosen in (files[:1], files):
            out = tmp_path / f"{kind}{len(chosen)}.png"
            code, text, _ = run(capsys, "plot", kind, *chosen, *given, "--out", str(out))
            assert code == 0 and text == f"{out}\n" and Image.open(out).width > 300
    assert Image.open(tmp_path / "tokens2.png").width == 3 * (SMALL + GAP) - GAP
    code, _, error = run(capsys, "plot", "layers", files[0], files[0], "--out", str(out))
    assert code == 2 and "files: expected reports of different methods, got FastV, 50 %" in error


def test_plot_layers_and_tradeoff_of_results(capsys, tmp_path):
    rows = [
        {"method": "none", "prefill_flops_reduction": 0.0, "exact_match": 1.0},
        {"method": "fastv:2:0.5", "prefill_flops_reduction": 0.4, "exact_match": 0.9},
    ]
    counts = [{"method": "dense", "visual_tokens_per_layer": [4, 4]}]
    for name, found in (("right", rows), ("left", counts), ("again", rows[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": found}))
    paths = {name: str(tmp_path / f"{name}.json") for name in ("right", "left", "again")}
    out = tmp_path / "it.png"
    for arguments in (["tradeoff", paths["right"], paths["again"]], ["layers", paths["left"]]):
        assert run(capsys, "plot", *arguments, "--out", str(out))[0] == 0
        assert Image.open(out).width > 300
        out.unlink()
    code, _, error = run(capsys, "plot", "tradeoff", paths["left"], "--out", str(out))
    assert code == 2 and not out.exists()
    assert "each row with method, prefill_flops_reduction, exact_match" in error
    (tmp_path / "again.json").write_text(json.dumps({"rows": [rows[0] | {"exact_match": 0.5}]}))
    code, _, error = run(capsys, "plot", "tradeoff", paths["right"], paths["again"])
    assert code == 2 and "has other numbers for 'none' than a file before it" in error


def test_plot_a_curve(capsys, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps([0.1 * i**2 for i in range(40)]))
    out = tmp_path / "curve.png"
    given = ("plot", "curve", str(tmp_path / "scores.json"), "--rule", "kneedle")
    assert run(capsys, *given, "--out", str(out))[0] == 0 and out.exists()
    code, _, error = run(capsys, *given, "--out", str(tmp_path / "no" / "it.png"))
    assert code == 2 and "--out: cannot write" in error
    (tmp_path / "scores.json").write_text("[1, true]")
    code, _, error = run(capsys, *given, "--out", str(out))
    assert code == 2 and "scores.json: expected a list of numbers" in error


def test_bench_is_the_benchmarks_of_the_tree(capsys, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(benchmarks, "measure", lambda cases, results, args: given.append(args) or 0)
    assert run(capsys, "bench", "select_topk", "--turns", "3", "--device", "cpu")[0] == 0
    assert given[0].ops == ["select_topk"] and given[0].turns == 3
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert "usage: vtp-kernels bench" in capsys.readouterr().out
    monkeypatch.setattr(vtp, "__file__", str(tmp_path / "vtp_kernels" / "__init__.py"))
    code, _, error = run(capsys, "bench")
    assert code == 2 and "the benchmarks are in the source repository" in error


def test_arguments_that_are_not_known_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "--jason"])
    assert "unrecognized arguments: --jason" in capsys.readouterr().err


def test_info(capsys):
    code, text, _ = run(capsys, "info")
    assert code == 0 and "attention_scores" in text
    code, text, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(text)
